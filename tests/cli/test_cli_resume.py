"""Killed at a step, or out of disk, and gone on from there: the same weights as a run that was never broken off."""

from __future__ import annotations

import hashlib
import resource
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml
from cli_setup import QUICK, logged, results, same_weights

import loku.cli.unlearn as unlearn_command
from loku.cli import main
from loku.training import UnlearningTrainer, last_whole_checkpoint
from loku_kernels.fisher_accumulator import FisherAccumulator

STEPS = ("--max_steps", "4", "--save_strategy", "steps", "--save_steps", "1")
DROPOUT = ("--lora_dropout", "0.2")  # so that random numbers matter
KILLED = """
import os, signal, sys
import loku.cli.unlearn as unlearn_command
from loku.cli import main
from loku.training import UnlearningTrainer
step = UnlearningTrainer.training_step
def until_the_third(self, *args, **kwargs):
    if self.state.global_step == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, *args, **kwargs)
UnlearningTrainer.training_step = until_the_third
main(sys.argv[1:])
"""


class Killed(BaseException):
    """Nothing catches it, as nothing catches a kill."""


@contextmanager
def before_step(number: int, action):
    """Calls ``action`` when that many optimiser steps were done."""
    original = UnlearningTrainer.training_step

    def training_step(self, *args, **kwargs):
        if self.state.global_step == number:
            action()
        return original(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(UnlearningTrainer, "training_step", training_step)
        yield


def kill() -> None:
    raise Killed


def training(workshop, method: str, output: Path, *options: object) -> list[object]:
    """The words of a run of four steps, with a checkpoint at each."""
    return workshop.unlearn(method, output, *STEPS, *DROPOUT, *options)


def start(words: list[object], stop_before: int) -> None:
    with before_step(stop_before, kill), pytest.raises(Killed):
        main([str(word) for word in words])


@contextmanager
def file_size_limit():
    """A function that makes all files end at so many bytes, which stands for a full disk, until the block ends."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def values(folder: Path) -> list[dict]:
    """What was logged, but for the times."""
    timed = ("seconds", "runtime", "second", "flos")
    return [{k: v for k, v in line.items() if not k.endswith(timed)} for line in logged(folder)]


@pytest.fixture(scope="module")
def unbroken(workshop, tmp_path_factory):
    """Method -> folder of a run that was never broken off; made once."""
    made: dict[str, Path] = {}

    def run(method: str) -> Path:
        if method not in made:
            made[method] = tmp_path_factory.mktemp("unbroken") / "run"
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("loku.cli.unlearn.write_report", lambda runs, folder: None)
                assert main([str(word) for word in training(workshop, method, made[method])]) == 0
        return made[method]

    return run


@pytest.mark.parametrize(("method", "stop_before"), [("loku", 1), ("kl", 3), ("simnpo", 2)])
def test_resumed_run_ends_at_the_same_weights(
    workshop, loku, folder, monkeypatch, no_plots, unbroken, method, stop_before
):
    whole, words = unbroken(method), training(workshop, method, folder)
    start(words, stop_before)
    assert not (folder / "results.json").exists()
    monkeypatch.setattr("loku.cli.importance.get_fila_state_dict", None)  # importance must not be computed again
    loku(*words, "--resume")
    assert same_weights(folder, whole)
    assert values(folder)[:-1] == values(whole)[:-1]  # the last line has averages over this start
    mine, theirs = results(folder), results(whole)
    for key in ("before", "after", "steps", "epochs"):
        assert mine[key] == theirs[key]
    assert ("importance_seconds" in mine) == (method == "loku")


def test_seconds_count_all_starts(workshop, loku, folder, no_plots):
    words = training(workshop, "loku", folder)
    start(words, stop_before=3)
    first = logged(folder)[-1]["seconds"]
    importance = (folder / "importance.safetensors").stat().st_mtime_ns
    with before_step(3, lambda: time.sleep(0.3)):
        loku(*words, "--resume")
    found = results(folder)
    assert (folder / "importance.safetensors").stat().st_mtime_ns == importance
    assert found["training_seconds"] + found["evaluation_seconds"] > first + 0.3
    assert found["seconds"] > first + 0.3 + found["importance_seconds"]
    assert found["tokens_per_second"] * found["training_seconds"] == pytest.approx(
        logged(folder)[-1]["num_input_tokens_seen"]
    )


def test_killed_process_goes_on_with_the_settings_it_began_with(workshop, loku, folder, no_plots, unbroken):
    words = [str(word) for word in training(workshop, "loku", folder)]
    dead = subprocess.run([sys.executable, "-c", KILLED, *words], capture_output=True)
    assert dead.returncode == -signal.SIGKILL and Path(last_whole_checkpoint(folder)).name == "checkpoint-2"
    loku("unlearn", "--output_dir", folder, "--resume")  # nothing else said
    assert same_weights(folder, unbroken("loku"))


def test_truncated_checkpoint_is_passed_over(workshop, loku, folder, no_plots, unbroken):
    words = training(workshop, "loku", folder)
    start(words, stop_before=3)
    for name, size in (("adapter_model.safetensors", 1000), ("optimizer.pt", 1000)):
        with (folder / "checkpoint-3" / name).open("r+b") as file:
            file.truncate(size)
    loku(*words, "--resume")
    assert same_weights(folder, unbroken("loku"))


def test_finetune_resumes(workshop, loku, folder, tmp_path):
    def words(output):
        quick = QUICK[: QUICK.index("--rank")]
        sources = ["--train", workshop / "forget.jsonl", workshop / "retain.jsonl"]
        return ["finetune", "--model", workshop / "gpt_neo", *sources, "--output_dir", output, *quick, *STEPS]

    loku(*words(tmp_path / "whole"))
    start(words(folder), stop_before=2)
    loku(*words(folder), "--resume")
    assert same_weights(folder, tmp_path / "whole", "model/model.safetensors")
    assert results(folder)["after"] == results(tmp_path / "whole")["after"]
    assert values(folder)[:-1] == values(tmp_path / "whole")[:-1]


def test_demo_goes_on_where_it_was_broken_off(loku, tmp_path, monkeypatch, no_plots):
    monkeypatch.setattr("loku.cli.report.write_report", lambda *args, **options: None)
    sizes = ["--people", "3", "--forget", "1", "--memorise_epochs", "4", "--unlearn_epochs", "1"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    loku("demo", "--output_dir", whole, *sizes)
    start(["demo", "--output_dir", broken, *sizes, "--overwrite"], stop_before=3)
    assert last_whole_checkpoint(broken / "target") is not None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("loku.cli.unlearn.save_adapter", lambda *args: kill())
        with pytest.raises(Killed):
            main(["demo", "--output_dir", str(broken), "--resume"])
    monkeypatch.setattr("loku.cli.finetune.load_tokenizer", None)  # the model must not be trained again
    loku("demo", "--output_dir", broken, "--resume")
    assert same_weights(broken / "target", whole / "target", "model/model.safetensors")
    assert all(same_weights(broken / method, whole / method) for method in ("loku", "gd"))


@pytest.mark.parametrize(("size", "at"), [(10000, ""), (900, "metrics.jsonl")])
def test_full_disk_while_training(workshop, loku, refused, folder, no_plots, unbroken, size, at):
    words = training(workshop, "loku", folder)
    with file_size_limit() as limit, before_step(2, lambda: limit(size)):
        line = refused(*words)
    assert f"{folder / at} cannot be written" in line
    assert Path(last_whole_checkpoint(folder)).name == "checkpoint-2"
    loku(*words, "--resume")
    assert same_weights(folder, unbroken("loku"))


def test_full_disk_at_the_end(workshop, loku, refused, folder, no_plots, unbroken):
    words = training(workshop, "kl", folder)
    original = unlearn_command.save_adapter
    with file_size_limit() as limit, pytest.MonkeyPatch.context() as patch:
        patch.setattr(unlearn_command, "save_adapter", lambda *args: (limit(10000), original(*args)))
        line = refused(*words)
    assert "adapter cannot be written" in line and not (folder / "adapter").exists()
    assert Path(last_whole_checkpoint(folder)).name == "checkpoint-4"
    loku(*words, "--resume")
    assert same_weights(folder, unbroken("kl"))
    assert results(folder)["after"] == results(unbroken("kl"))["after"]


def test_full_disk_in_an_export(workshop, loku, refused, tmp_path, unbroken):
    adapter, exported = unbroken("kl") / "adapter", tmp_path / "exported"
    words = ["export", "--model", workshop / "llama", "--adapter", adapter, "--output_dir", exported]
    with file_size_limit() as limit:
        limit(1000)
        assert "cannot be written" in refused(*words)
    assert not list(exported.glob("adapter*")) and not [path for path in tmp_path.rglob(".*")]
    loku(*words, "--resume")
    assert same_weights(exported, adapter, "adapter_model.safetensors")
    for line in logged(exported):
        contents = (exported / line["file"]).read_bytes()
        assert line["bytes"] == len(contents) and line["sha256"] == hashlib.sha256(contents).hexdigest()
    assert "holds a run already" in refused(*words)
    for damaged in (False, True):
        if damaged:
            (exported / "adapter_model.safetensors").write_bytes(b"")
        written = (exported / "results.json").stat().st_mtime_ns
        loku("export", "--output_dir", exported, "--resume")  # the rest of the words is in its config.yaml
        assert ((exported / "results.json").stat().st_mtime_ns > written) == damaged
    assert same_weights(exported, adapter, "adapter_model.safetensors")
    assert "began with format = adapter" in refused(*words, "--resume", "--format", "merged")


@pytest.mark.parametrize("minutes", [0, 10])
def test_full_disk_in_an_importance_pass(workshop, loku, refused, tmp_path, minutes):
    words = ["importance", "--model", workshop / "llama", *workshop.texts, "--fisher_save_minutes", minutes]
    loku(*words, "--output_dir", tmp_path / "unbroken")
    with file_size_limit() as limit:
        limit(1500 if minutes == 0 else 4000)
        assert "cannot be written" in refused(*words, "--output_dir", tmp_path / "full")
    assert not [path for path in tmp_path.rglob(".*")]  # no halves left behind
    loku(*words, "--output_dir", tmp_path / "full", "--resume")
    assert same_weights(tmp_path / "full", tmp_path / "unbroken", "importance.safetensors")


@pytest.fixture
def updates(monkeypatch):
    """A list of batches gone through in importance passes; one is killed before it begins number ``updates.last``."""

    class Updates(list):
        last = None

    seen, original = Updates(), FisherAccumulator.update

    def update(self, batch, *args):
        if len(seen) == seen.last:
            kill()
        seen.append(batch)
        return original(self, batch, *args)

    monkeypatch.setattr(FisherAccumulator, "update", update)
    return seen


@pytest.mark.parametrize("minutes", [0, 10])
@pytest.mark.parametrize("stop", [1, 4, 5, 7, 9])
def test_importance_goes_on_where_it_was_broken_off(workshop, loku, tmp_path, updates, stop, minutes):
    """Two passes over five batches, the first three of them of the forget set."""
    words = [
        "importance", "--model", workshop / "llama", *workshop.texts, "--fisher_batch_tokens", 48,
        "--fisher_save_minutes", minutes, "--fisher_memory_budget", 90_000,
    ]  # fmt: skip
    loku(*words, "--output_dir", tmp_path / "unbroken")
    assert len(updates) == 10
    updates.clear()
    broken = tmp_path / "broken"
    updates.last = stop
    with pytest.raises(Killed):
        main([str(word) for word in [*words, "--output_dir", broken]])
    updates.last = None
    loku(*words, "--output_dir", broken, "--resume")
    assert len(updates) == 10 + (0 if minutes == 0 else stop % 5)  # what was done twice
    assert same_weights(broken, tmp_path / "unbroken", "importance.safetensors")
    assert {path.name for path in broken.iterdir()} == {path.name for path in (tmp_path / "unbroken").iterdir()}
    loku(*words, "--output_dir", broken, "--resume")
    assert len(updates) <= 10 + stop % 5  # it was finished


def test_importance_does_not_go_on_with_other_data(workshop, loku, refused, tmp_path, updates):
    forget = tmp_path / "forget.jsonl"
    forget.write_text((workshop / "forget_text.jsonl").read_text())
    words = [
        "importance", "--model", workshop / "llama", "--forget", forget, *workshop.texts[2:],
        "--fisher_save_minutes", 0, "--fisher_memory_budget", 90_000, "--output_dir", tmp_path / "run",
    ]  # fmt: skip
    updates.last = 3
    with pytest.raises(Killed):
        main([str(word) for word in words])
    updates.last = None
    forget.write_text((workshop / "retain_text.jsonl").read_text())
    assert "was begun with another model, other data or other settings" in refused(*words, "--resume")
    assert "began with fila_eps" in refused(*words, "--resume", "--fila_eps", "1e-3")


@pytest.mark.parametrize("changed", ["forget", "retain"])
def test_row_weights_of_other_data_are_refused(workshop, refused, folder, tmp_path, monkeypatch, changed):
    """Those that an earlier start of the run has computed, before the file was edited."""
    files = {name: tmp_path / f"{name}.jsonl" for name in ("forget", "retain")}
    for name, file in files.items():
        file.write_text((workshop / f"{name}_text.jsonl").read_text())
    words = workshop.unlearn("loku", folder, "--forget", files["forget"], "--retain", files["retain"])
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr("loku.cli.unlearn.initialize_lora_fila_weights", lambda *args, **options: kill())
        main([str(word) for word in words])
    files[changed].write_text(files[changed].read_text().partition("\n")[0] + "\n")
    assert f"is not for what --{changed} holds now" in refused(*words, "--resume")


def test_a_run_cannot_go_on_with_another_adapter_or_other_data(workshop, refused, folder, no_plots):
    words = training(workshop, "ihl", folder)
    start(words, stop_before=2)
    before = (folder / "config.yaml").read_text()
    assert "began with rank = 4, and cannot go on with 8" in refused(*words, "--resume", "--rank", "8")
    line = refused(*words, "--resume", "--retain_weight", "50")
    assert "began with retain_weight = None, and cannot go on with 50.0" in line
    assert "began with method = ihl" in refused(*words, "--resume", "--method", "gd")
    assert "holds a run already" in refused(*words) and (folder / "config.yaml").read_text() == before


def test_a_run_may_go_on_for_longer(workshop, loku, folder, no_plots):
    words = training(workshop, "ihl", folder)
    loku(*words)
    loku("unlearn", "--output_dir", folder, "--resume", "--max_steps", "6")
    assert results(folder)["steps"] == 6 and yaml.safe_load((folder / "config.yaml").read_text())["max_steps"] == 6


@pytest.mark.parametrize(
    ("what", "options", "where", "rest"),
    [
        ("tdec", ["--forget", "tdec[0:4]"], "loku.cli.evaluate.extraction_likelihood", 1),
        ("tofu", ["--forget", "forget01"], "loku.evaluation.tofu._answers", 3),
        ("perplexity", ["--text", "wikitext2:test", "full"], "loku.cli.evaluate.perplexity", 1),
    ],
)
def test_evaluation_goes_on_where_it_was_broken_off(
    workshop, loku, refused, tmp_path, monkeypatch, what, options, where, rest
):
    words = ["evaluate", "--model", workshop / "phi", "--benchmark", what, "--data_dir", workshop.root, *options]
    loku(*words, "--output_dir", tmp_path / "unbroken")
    module, _, name = where.rpartition(".")
    original, calls = getattr(sys.modules[module], name), []

    def measure_once(*args, **settings):
        calls.append(args)
        return original(*args, **settings) if len(calls) == 1 else kill()

    monkeypatch.setattr("loku.cli.evaluate._SEQUENCES", 2)
    monkeypatch.setattr(where, measure_once)
    broken = tmp_path / "broken"
    with pytest.raises(Killed):
        main([str(word) for word in [*words, "--output_dir", broken]])
    assert "or go on with --resume" in refused(*words, "--output_dir", broken)
    calls.clear()
    monkeypatch.setattr(where, lambda *args, **settings: calls.append(args) or original(*args, **settings))
    loku(*words, "--output_dir", broken, "--resume")
    assert len(calls) == rest  # but for what had been measured
    (broken / "results.json").unlink()
    loku(*words, "--output_dir", broken, "--resume")
    assert len(calls) == rest
    assert results(broken) == results(tmp_path / "unbroken")


def test_a_run_given_more_steps_reports_what_it_ends_with(workshop, loku, folder, no_plots):
    words = workshop.unlearn("gd", folder, "--save_strategy", "steps", "--save_steps", "1", "--learning_rate", "1e-2")
    loku(*words, "--max_steps", "2")
    first = results(folder)["after"]
    loku(*words, "--max_steps", "6", "--resume")
    last = [line for line in logged(folder) if "eval_forget_loss" in line][-1]
    assert results(folder)["steps"] == last["step"] == 6
    assert results(folder)["after"]["forget_loss"] == last["eval_forget_loss"] != first["forget_loss"]
