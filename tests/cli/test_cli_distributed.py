"""`torchrun -m loku`: two processes, one run folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as distributed
from cli_setup import QUICK, logged, results
from safetensors.torch import load_file
from two_processes import FSDP_CONFIG, torchrun


def test_torchrun_without_an_accelerator_makes_one_run_of_its_processes(workshop, loku, tmp_path, no_plots):
    """Nothing on the command line says that it is a CPU: by themselves, the processes would not know of each other."""
    two, one = tmp_path / "two", tmp_path / "one"
    words = [str(word) for word in workshop.unlearn("loku", two) if word != "--use_cpu"]
    assert torchrun("-m", "loku", *words).count("Before") == 1  # one table
    loku(*workshop.unlearn("loku", one, "--gradient_accumulation_steps", 2))
    assert [line["step"] for line in logged(two)] == [line["step"] for line in logged(one)]
    assert results(two)["steps"] == results(one)["steps"]
    found, expected = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (two, one))
    assert found.keys() == expected.keys()
    for name, weight in found.items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-3, atol=1e-4 * float(weight.abs().max()))


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


def test_commands_under_fsdp_end_as_one_process_does(workshop, loku, tmp_path, no_plots):
    """With what is measured after the training: EL_10, which waits for MA as long as that is not reached."""
    (tmp_path / "fsdp.json").write_text(json.dumps(FSDP_CONFIG))
    sharded = ["--fsdp", "full_shard", "--fsdp_config", tmp_path / "fsdp.json"]
    sequences = ["--forget", "tdec[0:4]", "--retain", "tdec[2:6]", "--data_dir", workshop.root]
    goal = ["--benchmark", "tdec", "--el_threshold", 0, "--ma_threshold", 0]
    commands = {method: workshop.unlearn(method, tmp_path / method, *sequences, *goal) for method in ("loku", "ihl")}
    quick = QUICK[: QUICK.index("--rank")]
    words = ["finetune", "--model", workshop / "llama", "--train", workshop / "forget_text.jsonl", *quick]
    commands["finetune"] = [*words, "--output_dir", tmp_path / "finetune"]
    lines = [[*command, *sharded] for command in commands.values()]
    lines = [[str(word) for word in line if word != "--use_cpu"] for line in lines]
    (tmp_path / "commands.json").write_text(json.dumps(lines))
    script = Path(__file__).with_name("fsdp_command.py")
    torchrun(str(script), str(tmp_path / "commands.json"), PYTHONPATH=str(script.parents[1]))
    for name, command in commands.items():
        one = tmp_path / "one" / name
        loku(*command, "--gradient_accumulation_steps", 2, "--output_dir", one)
        after, expected = results(tmp_path / name)["after"], results(one)["after"]
        assert after == pytest.approx(expected, rel=1e-3) and ("el_10" in after) == (name != "finetune")
        file = "model/model.safetensors" if name == "finetune" else "adapter/adapter_model.safetensors"
        found, weights = (load_file(folder / file) for folder in (tmp_path / name, one))
        assert found.keys() == weights.keys()
        for key, weight in found.items():
            torch.testing.assert_close(weight, weights[key], rtol=1e-3, atol=1e-4 * float(weight.abs().max()))


def test_a_program_keeps_the_process_group_that_it_made(workshop, loku, tmp_path):
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        loku("importance", "--model", workshop / "llama", *workshop.texts, "--output_dir", tmp_path / "rows")
        assert distributed.is_initialized()
    finally:
        distributed.destroy_process_group()
