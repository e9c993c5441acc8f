"""`torchrun -m loku`: two processes, one run folder."""

from __future__ import annotations

import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch.distributed as distributed
from cli_setup import QUICK, logged, results
from safetensors.torch import load_file
from two_processes import FSDP_CONFIG, torchrun

GOAL = ("--benchmark", "tdec", "--el_threshold", 0, "--ma_threshold", 0)
ADAPTER, WHOLE = "adapter/adapter_model.safetensors", "model/model.safetensors"


def assert_same_end(folder: Path, one: Path, file: str = ADAPTER) -> None:
    """Of a run of two processes and one of a single process with twice the accumulation."""
    assert results(folder)["after"] == pytest.approx(results(one)["after"], rel=1e-3)
    found, weights = (load_file(run / file) for run in (folder, one))
    assert found.keys() == weights.keys()
    for key, weight in found.items():
        torch.testing.assert_close(weight, weights[key], rtol=1e-3, atol=1e-4 * float(weight.abs().max()))


def test_torchrun_without_an_accelerator_makes_one_run_of_its_processes(workshop, loku, tmp_path, no_plots):
    """Nothing on the command line says that it is a CPU: by themselves, the processes would not know of each other."""
    two, one = tmp_path / "two", tmp_path / "one"
    words = [str(word) for word in workshop.unlearn("loku", two) if word != "--use_cpu"]
    assert torchrun("-m", "loku", *words).count("Before") == 1  # one table
    loku(*workshop.unlearn("loku", one, "--gradient_accumulation_steps", 2))
    assert [line["step"] for line in logged(two)] == [line["step"] for line in logged(one)]
    assert results(two)["steps"] == results(one)["steps"]
    assert_same_end(two, one)


def test_importance_is_shared_between_processes(workshop, loku, tmp_path):
    two, one = tmp_path / "two", tmp_path / "one"
    words = ["importance", "--model", workshop / "llama", *workshop.texts, "--fisher_batch_tokens", 48]
    printed = torchrun("-m", "loku", *map(str, words), "--output_dir", str(two))
    assert printed.count("written to") == 1
    loku(*words, "--output_dir", one)
    found, expected = (load_file(folder / "importance.safetensors") for folder in (two, one))
    assert found.keys() == expected.keys()
    for name, weights in found.items():
        torch.testing.assert_close(weights, expected[name], rtol=1e-4, atol=0.0)


def measured_to_the_end(workshop, method: str, folder: Path) -> list[object]:
    """The words of a run after which EL_10 is measured, as it waits for MA as long as that is not reached."""
    sequences = ["--forget", "tdec[0:4]", "--retain", "tdec[2:6]", "--data_dir", workshop.root]
    return workshop.unlearn(method, folder, *sequences, *GOAL)


def finetuning(workshop, folder: Path) -> list[object]:
    quick = QUICK[: QUICK.index("--rank")]
    return [
        "finetune", "--model", workshop / "llama", "--train", workshop / "forget_text.jsonl", *quick,
        "--output_dir", folder,
    ]  # fmt: skip


def test_commands_under_fsdp_end_as_one_process_does(workshop, loku, tmp_path, no_plots):
    (tmp_path / "fsdp.json").write_text(json.dumps(FSDP_CONFIG))
    sharded = ["--fsdp", "full_shard", "--fsdp_config", tmp_path / "fsdp.json"]
    commands = {method: measured_to_the_end(workshop, method, tmp_path / method) for method in ("loku", "ihl")}
    commands["finetune"] = finetuning(workshop, tmp_path / "finetune")
    lines = [[*command, *sharded] for command in commands.values()]
    lines = [[str(word) for word in line if word != "--use_cpu"] for line in lines]
    (tmp_path / "commands.json").write_text(json.dumps(lines))
    script = Path(__file__).with_name("fsdp_command.py")
    torchrun(str(script), str(tmp_path / "commands.json"), PYTHONPATH=str(script.parents[1]))
    for name, command in commands.items():
        one = tmp_path / "one" / name
        loku(*command, "--gradient_accumulation_steps", 2, "--output_dir", one)
        assert ("el_10" in results(one)["after"]) == (name != "finetune")
        assert_same_end(tmp_path / name, one, WHOLE if name == "finetune" else ADAPTER)


@pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed")
def test_commands_under_deepspeed_end_as_one_process_does(workshop, loku, tmp_path, no_plots):
    def configuration(stage: int, **more) -> list[object]:
        options = {"stage": stage, "stage3_param_persistence_threshold": 0, "overlap_comm": False, **more}
        sizes = dict.fromkeys(("train_micro_batch_size_per_gpu", "gradient_accumulation_steps"), "auto")
        path = tmp_path / f"zero{stage}.json"
        path.write_text(json.dumps({**sizes, "zero_optimization": options, "zero_allow_untested_optimizer": True}))
        return ["--deepspeed", path]

    def run(command: list[object], *options: object) -> str:
        words = [str(word) for word in (*command, *options) if word != "--use_cpu"]
        return torchrun("-m", "loku", *words, DS_ACCELERATOR="cpu")

    def check(command: list[object], folder: Path, *zero: object, file: str = ADAPTER) -> None:
        run(command, *zero)
        loku(*command, "--gradient_accumulation_steps", 2, "--output_dir", tmp_path / "one" / folder.name)
        assert_same_end(folder, tmp_path / "one" / folder.name, file)

    gathering = {"stage3_gather_16bit_weights_on_model_save": True}
    folders = {name: tmp_path / name for name in ("finetune", "measured", "loku", "ihl")}
    check(finetuning(workshop, folders["finetune"]), folders["finetune"], *configuration(3, **gathering), file=WHOLE)
    check(
        measured_to_the_end(workshop, "ihl", folders["measured"]), folders["measured"], *configuration(3, **gathering)
    )
    for method, zero in {"loku": configuration(2), "ihl": configuration(3, **gathering)}.items():
        command = workshop.unlearn(method, folders[method], "--save_strategy", "epoch")
        check(command, folders[method], *zero)
        for late in ("checkpoint-2", "adapter"):
            shutil.rmtree(folders[method] / late)
        run(command, *zero, "--resume")
        assert_same_end(folders[method], tmp_path / "one" / method)
    for refused, zero, words in (
        ("loku", configuration(3, **gathering), "needs DeepSpeed's ZeRO of stage 1 or 2"),
        ("ihl", configuration(3), "stage3_gather_16bit_weights_on_model_save"),
    ):
        with pytest.raises(AssertionError, match=words):
            run(workshop.unlearn(refused, tmp_path / "refused" / refused), *zero)


def test_a_program_keeps_the_process_group_that_it_made(workshop, loku, tmp_path):
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        loku("importance", "--model", workshop / "llama", *workshop.texts, "--output_dir", tmp_path / "rows")
        assert distributed.is_initialized()
    finally:
        distributed.destroy_process_group()
