"""Mistakes in what the user gives: a line that names them, and nothing lost. Our own mistakes keep their traceback."""

from __future__ import annotations

import importlib.util
import json

import numpy as np
import pytest
from cli_setup import results, write_lines
from transformers import AutoTokenizer

from loku.cli import main
from loku.cli.errors import CommandError, blaming, run_command


@pytest.fixture
def unlearn_refused(workshop, refused, folder):
    """What `loku unlearn` says to these options; it leaves no folder that a corrected run would stumble over."""

    def call(*options: object, method: str = "ihl", family: str = "llama") -> str:
        words = workshop.unlearn(method, folder, *options, family=family)
        line = refused(*words)
        assert refused(*words) == line  # not: "holds a run already"
        return line

    return call


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no records"),
        ("\n\n", "holds no records"),
        ('{"question": "Who?", "answer": "Ada"}\n{"question": "Wh', "line 2: not valid JSON"),
        ('{"question": "Who?"}\n', "line 1: expected question and answer, text, or input_ids"),
        ('{"question": "Who?", "answer": 3}\n', "answer must be a string, got 3"),
        ('{"question": "Who? \\ud83d", "answer": "A"}\n', "question must be text, but '\\ud83d' at character 5"),
        ('{"input_ids": [1, 2], "labels": ["x", 2]}\n', "labels must be a list of token ids"),
        ('["Who?"]\n', "expected a JSON object, got str"),
    ],
)
def test_corrupt_or_empty_jsonl(unlearn_refused, tmp_path, content, message):
    path = tmp_path / "mine.jsonl"
    path.write_text(content)
    line = unlearn_refused("--forget", path)
    assert str(path) in line and message in line


def test_split_that_does_not_exist(unlearn_refused, workshop):
    line = unlearn_refused("--retain", "retain80", "--data_dir", workshop.root)
    assert "'retain80'" in line and "retain99" in line and "tdec" in line
    assert "rows that exist: there are 6" in unlearn_refused("--retain", "tdec[0:32]", "--data_dir", workshop.root)
    assert "wikitext2:validation" in unlearn_refused("--retain", "wikitext2:valid", "--data_dir", workshop.root)
    assert "data_dir" in unlearn_refused("--retain", "full", "--data_dir", workshop / "nowhere")


def test_source_that_is_not_given(workshop, refused, folder):
    words = ["unlearn", "--model", workshop / "llama", "--output_dir", folder]
    assert "--forget is required" in refused(*words)
    words += ["--forget", workshop / "forget.jsonl"]
    assert "--retain is required" in refused(*words)
    assert "--retain is required" in refused(*words, "--retain_weight", "0")  # importance needs it all the same
    assert not folder.exists()


def test_tokenizer_without_eos(unlearn_refused, workshop, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(workshop / "tokenizer")
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    line = unlearn_refused("--tokenizer", tmp_path / "tokenizer")
    assert "has no EOS token" in line and str(tmp_path / "tokenizer") in line


def test_sequence_longer_than_the_context(unlearn_refused, workshop, tmp_path):
    path = write_lines(tmp_path / "long.jsonl", [{"question": "Who?", "answer": "Ada " * 100}])
    line = unlearn_refused("--forget", path)
    assert f"{path}: line 1: " in line and "max_length = 64" in line
    assert "raise max_length" in line
    assert "--max_length 65 exceeds the model's context of 64" in unlearn_refused("--max_length", "65")
    assert "max_length must be at least 2" in unlearn_refused("--max_length", "1")


def test_tokens_that_the_model_does_not_know(unlearn_refused, tmp_path):
    path = write_lines(tmp_path / "ids.jsonl", [{"input_ids": [1, 2, 50256]}])
    assert f"{path} has the token id 50256" in unlearn_refused("--forget", path)
    path = write_lines(tmp_path / "labels.jsonl", [{"input_ids": [1, 2, 3], "labels": [-100, 2, 50256]}])
    assert f"{path} has the label 50256" in unlearn_refused("--forget", path)


def test_models_and_adapters_that_are_none(unlearn_refused, workshop, refused, tmp_path):
    assert "--model is required" in refused("evaluate", "--tokenizer", workshop / "llama")
    assert "nowhere" in unlearn_refused("--model", tmp_path / "nowhere")
    assert "--adapter" in unlearn_refused("--adapter", workshop / "llama")
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in (workshop / "llama").iterdir():
        content = file.read_bytes()
        (broken / file.name).write_bytes(content[:5000] if file.suffix == ".safetensors" else content)
    assert f"--model {broken}" in unlearn_refused("--model", broken)


def test_adapter_of_another_model(workshop, loku, unlearn_refused, tmp_path, no_plots):
    config = {"r": 2, "peft_type": "LORA", "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    import torch
    from safetensors.torch import save_file

    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(config))
    weights = {"lora_A": torch.zeros(2, 48), "lora_B": torch.zeros(48, 2)}
    place = "base_model.model.model.layers.0.self_attn.q_proj"
    save_file(
        {f"{place}.{name}.weight": value for name, value in weights.items()}, folder / "adapter_model.safetensors"
    )
    line = unlearn_refused("--adapter", folder)
    assert f"--adapter {folder}" in line and "size mismatch" in line


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--resume", "--save_only_model", "true"], "--save_only_model leaves out"),
        (["--eval_strategy", "steps"], "--eval_strategy must be no, as the trainer has no evaluation set"),
        (["--save_strategy", "best"], "--save_strategy must be no, epoch or steps"),
        (["--max_steps", "0"], "--max_steps must be positive, or -1"),
    ],
)
def test_settings_that_would_fail_late(unlearn_refused, options, message):
    assert message in unlearn_refused(*options)


def test_model_config_with_an_unknown_key_or_type(workshop, refused, folder, tmp_path):
    path = tmp_path / "model.yaml"
    words = ["finetune", "--model_config", path, "--tokenizer", workshop / "tokenizer", "--output_dir", folder]
    words += ["--train", workshop / "forget.jsonl", "--use_cpu"]
    for content, message in (
        ("model_type: gpt_neo\nhiden_size: 32\n", "has no hiden_size"),
        ("model_type: gpt_nio\n", "gpt_nio"),
        ("hidden_size: 32\n", "has no model_type"),
        ("model_type: llama\nhidden_size: '32'\n", "hidden_size"),
        ("model_type: llama\nhidden_size: 33\nnum_attention_heads: 2\n", "33"),
        ("model_type: llama\nhidden_size: 32\nnum_attention_heads: 2\nhidden_act: nope\n", "nope"),
        ("model_type: llama\nhidden_size: 32\nnum_attention_heads: 0\n", f"--model_config {path}: integer division"),
        ("model_type: gpt_neo\nvocab_size: -1\n", f"--model_config {path}: Trying to create tensor with negative"),
    ):
        path.write_text(content)
        assert message in refused(*words)
    assert "give one of --model and --model_config" in refused(*words, "--model", workshop / "llama")
    assert "--train is required" in refused(*words[:-3], "--use_cpu")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--method", "lock"), "method must be one of loku, ihl"),
        (("--beta", "0.1"), "method 'ihl' has no option 'beta'"),
        (("--rank", "20"), "--rank 20 exceeds 16, the smaller side of model.layers.0.self_attn.k_proj"),
        (("--rank", "0"), "--rank must be positive, but is 0"),
        (("--lora_dropout", "2"), "--lora_dropout must be from 0 to below 1, but is 2.0"),
        (("--targets", "qkv"), "names no linear layer of the model, which has down_proj, gate_proj"),
        (("--targets", "q_proj,v_prj"), "--targets 'v_prj' names no linear layer of the model, which has down_proj"),
        (("--targets", ","), "--targets ',' names no linear layer"),
        (("--evaluate_every", "0"), "--evaluate_every must be epoch or a number of steps"),
        (("--dtype", "float8"), "--dtype"),
        (("--packing", "always", "--attn_implementation", "eager", "--row_tokens", "3"), "row_tokens must be"),
        (("--benchmark", "tofu"), "--forget must be one of forget01"),
        (("--retain_log", "nowhere.json"), "--retain_log nowhere.json"),
        (("--learning_rate", "fast"), "learning_rate/--learning-rate: invalid float value: 'fast'"),
        (("--label_smoothing_factor", "0.1"), "label_smoothing_factor must be 0"),
        (("--limit", "0"), "--limit must be positive, but is 0"),
        (("--limit", "-3"), "--limit must be positive, but is -3"),
        (("--per_device_train_batch_size", "0"), "--per_device_train_batch_size must be positive, but is 0"),
        (("--gradient_accumulation_steps", "0"), "--gradient_accumulation_steps must be positive, but is 0"),
        (("--learning_rate", "-1"), "--learning_rate must be finite and not negative, but is -1.0"),
        (("--learning_rate", "nan"), "--learning_rate must be finite and not negative, but is nan"),
        (("--seed", "-1"), "--seed must be from 0 to 2**32 - 1, but is -1"),
        (("--fisher_batch_tokens", "0"), "--fisher_batch_tokens must be positive, but is 0"),
        (("--eval_on_start", "true"), "--eval_on_start must be false, as the trainer has no evaluation set"),
        (("--resume_from_checkpoint", "there"), "--resume_from_checkpoint must be left out: --resume goes on from"),
        (("--lr_scheduler_type", "warmup_stable_decay"), "--lr_scheduler_type warmup_stable_decay with"),
        (("--lr_scheduler_type", "cosine", "--lr_scheduler_kwargs", '{"end": 1}'), "unexpected keyword argument 'end'"),
    ],
)
def test_options_that_do_not_fit(unlearn_refused, options, message):
    assert message in unlearn_refused(*options)


@pytest.mark.parametrize(
    ("options", "package", "message"),
    [
        (("--optim", "adamw_bnb_8bit"), "bitsandbytes", "--optim adamw_bnb_8bit"),
        (("--report_to", "wandb"), "wandb", "--report_to wandb"),
        (("--attn_implementation", "flash_attention_2"), "flash_attn", "--model"),
    ],
)
def test_packages_that_are_not_installed(unlearn_refused, options, package, message):
    if importlib.util.find_spec(package):
        pytest.skip(f"{package} is installed")
    assert message in unlearn_refused(*options)


def test_a_head_that_is_tied_is_no_target(unlearn_refused):
    line = unlearn_refused("--targets", "q_proj,lm_head", family="gpt_neo")
    assert "names the head, lm_head, whose weight is the input embedding's too" in line


def test_options_of_other_commands_that_do_not_fit(workshop, refused, folder):
    """One table for all of them, and nothing is written."""
    model = ["--model", workshop / "llama", "--output_dir", folder]
    assert "--limit must be positive" in refused("evaluate", *model, "--limit", "0")
    line = refused("importance", *model, *workshop.questions, "--fisher_batch_tokens", "0")
    assert "--fisher_batch_tokens must be positive, but is 0" in line
    train = ["finetune", *model, "--train", workshop / "forget.jsonl", "--use_cpu"]
    assert "--learning_rate must be finite" in refused(*train, "--learning_rate", "inf")
    assert "warmup_stable_decay" in refused(*train, "--lr_scheduler_type", "warmup_stable_decay")
    assert "--memorise_epochs must be positive" in refused("demo", "--output_dir", folder, "--memorise_epochs", "0")
    assert not folder.exists()


def test_tdec_without_a_goal(unlearn_refused, workshop):
    words = ["--forget", "tdec[0:2]", "--data_dir", workshop.root, "--benchmark", "tdec"]
    assert "needs --unseen, or both" in unlearn_refused(*words)
    assert "needs --unseen, or both" in unlearn_refused(*words, "--ma_threshold", "0.1")
    line = unlearn_refused(*words, "--forget", workshop / "forget_text.jsonl", "--unseen", "tdec[2:4]")
    assert "needs sequences of one length" in line


def test_retain_log_of_another_forget_set(workshop, loku, refused, folder, tmp_path):
    words = ["--forget", "forget01", "--data_dir", workshop.root, "--benchmark", "tofu", "--limit", "1"]
    loku("evaluate", "--model", workshop / "llama", *words, "--output_dir", tmp_path / "retain")
    path = tmp_path / "retain" / "eval_log_aggregated.json"
    log = json.loads(path.read_text())
    log["eval_log_forget.json"]["generated_text"]["0"][2] = "Another answer."
    path.write_text(json.dumps(log))
    line = refused(*workshop.unlearn("ihl", folder, *words, "--retain", "retain99", "--retain_log", path))
    assert f"--retain_log {path}: retain_log must have the forget samples" in line and "'Another answer.'" in line


def test_importance_file_that_is_none_or_of_another_model(unlearn_refused, workshop, loku, tmp_path):
    assert "`loku importance` writes one" in unlearn_refused("--importance", tmp_path / "rows.st", method="loku")
    (tmp_path / "rows.st").write_bytes(b"")
    assert f"--importance {tmp_path / 'rows.st'}" in unlearn_refused(
        "--importance", tmp_path / "rows.st", method="loku"
    )
    loku("importance", "--model", workshop / "phi", *workshop.questions, "--output_dir", tmp_path / "phi")
    file = tmp_path / "phi" / "importance.safetensors"
    assert "row weights" in unlearn_refused("--importance", file, method="loku")


def test_importance_of_other_settings_or_another_forget_set(unlearn_refused, workshop, loku, folder, tmp_path, capsys):
    words = ["--retain", workshop / "retain.jsonl", "--output_dir", tmp_path / "rows", "--fila_eps", "10"]
    loku("importance", "--model", workshop / "llama", "--forget", workshop / "retain.jsonl", *words)
    given = ("--importance", tmp_path / "rows" / "importance.safetensors")
    line = unlearn_refused(*given, method="loku")
    assert "--fila_eps was 10.0 when it was computed, but is 1e-05 here" in line
    words = workshop.unlearn("loku", folder, *given, "--fila_eps", "10", "--row_tokens", "1")
    assert main(list(map(str, words))) == 1  # for the row_tokens, which are looked at later
    assert "was computed for another forget set than --forget" in capsys.readouterr().err


def test_importance_that_is_not_finite(unlearn_refused, workshop, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(workshop / "llama")
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = torch.nan
    model.save_pretrained(tmp_path / "nan")
    AutoTokenizer.from_pretrained(workshop / "llama").save_pretrained(tmp_path / "nan")
    assert "importance: " in unlearn_refused("--model", tmp_path / "nan", method="loku")


def test_evaluations_that_cannot_be(workshop, refused, folder, tmp_path, monkeypatch):
    words = ["evaluate", "--model", workshop / "llama", "--data_dir", workshop.root, "--output_dir", folder]
    assert "--text is required" in refused(*words)
    assert "--forget must be one of forget01" in refused(*words, "--benchmark", "tofu", "--forget", "full")
    monkeypatch.setattr("loku.cli.benchmarks.evaluate_tofu", None)  # is found out before anything is measured
    assert "forget05_perturbed" in refused(*words, "--benchmark", "tofu", "--forget", "forget05")  # no such file here
    assert "--forget is required" in refused(*words, "--benchmark", "tdec")
    assert "one length" in refused(*words, "--benchmark", "tdec", "--forget", workshop / "forget.jsonl")
    np.save(tmp_path / "log.npy", np.zeros(3))
    tofu = ["--benchmark", "tofu", "--forget", "forget01"]
    assert "log.npy" in refused(*words, *tofu, "--retain_log", tmp_path / "log.npy")
    assert not folder.exists()
    for _ in range(2):  # nothing was measured, so that it can be tried again
        assert "loku-kernels[lm-eval]" in refused(*words, "--benchmark", "lm-eval")


def test_exports_and_reports_of_nothing(workshop, refused, tmp_path):
    export = ["export", "--model", workshop / "llama", "--output_dir", tmp_path / "out"]
    assert "--adapter is required" in refused(*export)
    assert "holds no adapter_model.safetensors" in refused(*export, "--adapter", tmp_path)
    assert "--runs is required" in refused("report")
    assert "has no config.yaml" in refused("report", "--runs", tmp_path)
    assert not (tmp_path / "out").exists()


def test_demo_keeps_what_an_earlier_one_left(refused, folder, monkeypatch):
    folder.mkdir()
    (folder / "mine").write_text("kept")
    assert "exists: choose another --output_dir" in refused("demo", "--output_dir", folder)
    assert "--forget must be from 1 to people - 1" in refused("demo", "--output_dir", folder, "--forget", "40")
    assert "people" in refused("demo", "--output_dir", folder, "--people", "100000", "--overwrite")
    assert (folder / "mine").read_text() == "kept"
    monkeypatch.setattr("loku.cli.demo._memorise", None)
    (folder / "mine").unlink()
    with pytest.raises(TypeError):  # the training, which is not the point
        main(["demo", "--output_dir", str(folder), "--overwrite"])
    assert (folder / "corpus" / "forget.jsonl").exists()
    assert "began with people = 40, and cannot go on with 30" in refused(
        "demo", "--output_dir", folder, "--people", "30", "--resume"
    )


def test_a_finished_run_is_not_overwritten(workshop, loku, refused, folder, no_plots):
    words = workshop.unlearn("ihl", folder)
    loku(*words)
    before = results(folder)
    assert "holds a run already: choose another folder, or go on with --resume" in refused(*words)
    assert results(folder) == before
    loku(*words, "--resume", "--save_strategy", "no")  # from the start, as there is no checkpoint
    assert results(folder)["after"] == before["after"]


def test_sequences_to_forget_and_to_keep_too(workshop, folder, tmp_path, capsys, no_plots):
    lines = [(workshop / f"{name}_text.jsonl").read_text() for name in ("retain", "forget")]
    both = tmp_path / "both.jsonl"
    both.write_text(lines[0] + "".join(lines[1].splitlines(keepends=True)[:3]))
    assert main([str(word) for word in workshop.unlearn("ihl", folder, "--retain", both)]) == 0
    warning = "loku: warning: 3 of the 4 sequences of --forget are also among those of --retain"
    assert capsys.readouterr().err.splitlines().count(warning) == 1
    assert main([str(word) for word in workshop.unlearn("ihl", tmp_path / "apart")]) == 0
    assert "also among" not in capsys.readouterr().err


def test_a_run_that_diverges_says_so(workshop, folder, capsys):
    """What is not finite is null, and the report is written all the same."""
    options = ["--learning_rate", "1e30", "--max_grad_norm", "0", "--evaluate_every", "1"]
    assert main([str(word) for word in workshop.unlearn("ga", folder, *options)]) == 0
    warning = "loku: warning: forget_loss, retain_loss: not finite, and null in results.json"
    assert warning in capsys.readouterr().err.splitlines()
    assert results(folder)["after"] == {"forget_loss": None, "retain_loss": None}
    assert "NaN" not in (folder / "results.json").read_text() and (folder / "report" / "report.html").exists()


def test_an_evaluation_that_is_not_finite_says_so(workshop, folder, capsys, monkeypatch):
    monkeypatch.setattr("loku.cli.evaluate.perplexity", lambda *args, **options: float("inf"))
    path = str(workshop / "forget_text.jsonl")
    words = ["evaluate", "--model", str(workshop / "llama"), "--text", path, "--output_dir", str(folder)]
    assert main(words) == 0
    assert f"loku: warning: {path} perplexity: not finite" in capsys.readouterr().err
    assert results(folder)["after"] == {f"{path} perplexity": None}


def test_our_own_mistakes_are_not_swallowed(workshop, folder, monkeypatch):
    def mistaken(*args):
        _first, _second = range(3)  # a ValueError

    monkeypatch.setattr("loku.cli.unlearn.Benchmark.evaluate", mistaken)
    with pytest.raises(ValueError, match="too many values"):
        main([str(word) for word in workshop.unlearn("ihl", folder)])


def test_the_traceback_is_there_for_who_asks(monkeypatch):
    def command(argv):
        with blaming("--model"):
            raise OSError("no such\n  file")

    monkeypatch.setenv("LOKU_TRACEBACK", "1")
    with pytest.raises(CommandError) as error:
        run_command(command, [])
    assert isinstance(error.value.__cause__, OSError)
    monkeypatch.setenv("LOKU_TRACEBACK", "0")
    assert run_command(command, []) == 1


def test_an_error_is_one_line(capsys):
    def command(argv):
        raise CommandError("several\n   lines\nof it")

    assert run_command(command, []) == 1
    assert capsys.readouterr().err == "loku: error: several lines of it\n"


def test_interrupting_is_no_mistake(capsys):
    def command(argv):
        raise KeyboardInterrupt

    assert run_command(command, []) == 130
    assert "Traceback" not in capsys.readouterr().err


def test_missing_packages_and_missing_modules_of_our_own(capsys, monkeypatch):
    import importlib

    def missing(name):
        raise ModuleNotFoundError(f"No module named {name!r}", name=missing.module)

    monkeypatch.setattr(importlib, "import_module", missing)
    missing.module = "peft"
    assert main(["export"]) == 1
    assert "pip install loku-kernels[train]" in capsys.readouterr().err
    missing.module = "loku.cli.exports"
    with pytest.raises(ModuleNotFoundError):
        main(["export"])
