"""The record of a run, evaluations during it, and which of its checkpoints are whole."""

from __future__ import annotations

import json

import pytest
import torch
from training_setup import causal_lm, sequences, trained_weights, trainer, with_adapter
from transformers import TrainerCallback

from loku.data import Role
from loku.training import EvaluationCallback, JsonLinesCallback, checkpoint_fault, last_whole_checkpoint

FORGET, RETAIN = sequences(6, 1), sequences(9, 2)


def run(folder, callbacks, resume=None, **options):
    settings = {"save_strategy": "steps", "save_steps": 2, **options}
    made = trainer(with_adapter(causal_lm("llama")), folder, FORGET, RETAIN, callbacks=callbacks, **settings)
    made.train(resume_from_checkpoint=resume)
    return made


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


class _Kill(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:
            raise KeyboardInterrupt


def measured(model):
    assert not model.training and not torch.is_grad_enabled()
    return {"noise": torch.rand(()).item()}


def test_json_lines_of_a_killed_and_resumed_run_are_those_of_a_whole_one(tmp_path):
    def callbacks(folder, *others):
        return [EvaluationCallback(measured, every=1), JsonLinesCallback(tmp_path / folder / "log.jsonl"), *others]

    run(tmp_path / "whole", callbacks("whole"))
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts", callbacks("parts", _Kill()))
    path = tmp_path / "parts" / "log.jsonl"
    assert lines(path)[-1]["step"] == 3  # an evaluation after the checkpoint
    before = lines(path)
    path.write_text(path.read_text() + '{"step": 3, "lo')  # cut short
    run(tmp_path / "parts", callbacks("parts"), resume=True)
    whole, parts = lines(tmp_path / "whole" / "log.jsonl"), lines(path)
    assert [(line["step"], line.keys()) for line in parts] == [(line["step"], line.keys()) for line in whole]
    for name in ("epoch", "loss", "forget_loss", "retain_loss", "learning_rate"):
        assert [line.get(name) for line in parts] == [line.get(name) for line in whole]
    kept = [line for line in before if line["step"] <= 2]
    assert parts[: len(kept)] == kept
    seconds = [line["seconds"] for line in parts]
    assert seconds == sorted(seconds) and seconds[0] < seconds[-1]
    assert [line["step"] for line in whole if "eval_noise" in line] == [0, 1, 2, 3, 4]
    assert [line["step"] for line in whole if "loss" in line] == [1, 2, 3, 4]
    run(tmp_path / "parts", callbacks("parts"), max_steps=1)
    assert [line["step"] for line in lines(path)] == [0, 1, 1, 1]


def test_values_that_are_not_finite_are_null(tmp_path):
    callbacks = [EvaluationCallback(lambda model: {"x": float("nan")}), JsonLinesCallback(tmp_path / "log.jsonl")]
    run(tmp_path, callbacks, max_steps=1)
    first = lines(tmp_path / "log.jsonl")[0]
    assert (first["step"], first["epoch"], first["eval_x"]) == (0, 0, None) and first["eval_runtime"] >= 0


def test_evaluation_does_not_change_the_training(tmp_path):
    """Not even where both draw random numbers."""
    plain = trainer(with_adapter(causal_lm("llama"), lora_dropout=0.3), tmp_path, FORGET, RETAIN)
    plain.train()
    callbacks = [EvaluationCallback(measured, every=1)]
    watched = trainer(with_adapter(causal_lm("llama"), lora_dropout=0.3), tmp_path, FORGET, RETAIN, callbacks=callbacks)
    watched.train()
    one, other = trained_weights(plain.model), trained_weights(watched.model)
    assert all(torch.equal(weight, other[name]) for name, weight in one.items())
    assert len({entry["eval_noise"] for entry in watched.state.log_history if "eval_noise" in entry}) == 5


@pytest.mark.parametrize(("every", "steps"), [("epoch", [0, 3, 6]), (2, [0, 2, 4])])
def test_stopping(tmp_path, every, steps):
    """At the first interval at which the aim is reached, with a checkpoint; not at step 0."""
    values = iter([0.0, 1.0, 0.0, 0.0, 0.0])
    callback = EvaluationCallback(lambda model: {"ma": next(values)}, every, stop=lambda metrics: metrics["ma"] <= 0)
    done = run(tmp_path, [callback], max_steps=20, save_steps=50)
    assert [entry["step"] for entry in done.state.log_history if "eval_ma" in entry] == steps
    assert done.state.global_step == steps[-1] and checkpoint_fault(tmp_path / f"checkpoint-{steps[-1]}") is None


@pytest.mark.parametrize(("every", "steps"), [("epoch", 3), (2, 2)])
def test_a_run_that_had_reached_its_aim_does_not_go_on(tmp_path, every, steps):
    def resumed(aim):
        return run(tmp_path, [EvaluationCallback(lambda model: {"ma": 0.5}, every, lambda m: m["ma"] <= aim)], True)

    stopped = run(tmp_path, [EvaluationCallback(lambda model: {"ma": 0.5}, every, stop=lambda m: True)], max_steps=20)
    expected = trained_weights(stopped.model)
    assert stopped.state.global_step == steps
    again = resumed(0.5)
    assert again.state.global_step == steps and not again.is_in_train
    assert all(torch.equal(weight, expected[name]) for name, weight in trained_weights(again.model).items())
    assert resumed(0.4).state.global_step > steps  # another aim


def test_a_run_that_was_at_its_last_step_does_not_go_on(tmp_path):
    """In the middle of an epoch, of three steps."""
    done = run(tmp_path, [], max_steps=4)
    again = run(tmp_path, [], True, max_steps=4)
    assert again.state.global_step == 4
    expected = trained_weights(done.model)
    assert all(torch.equal(weight, expected[name]) for name, weight in trained_weights(again.model).items())


class _KillAtTheEnd(TrainerCallback):
    def on_epoch_end(self, args, state, control, **kwargs):
        if state.global_step >= state.max_steps:
            raise KeyboardInterrupt


@pytest.mark.parametrize("max_steps", [4, 6])
def test_the_last_checkpoint_holds_the_last_evaluation(tmp_path, max_steps):
    """In the middle of an epoch, of three steps, and at the end of one, where no other begins: measured once."""

    def callbacks(*others):
        return [*others, EvaluationCallback(measured), JsonLinesCallback(tmp_path / "log.jsonl")]

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, callbacks(_KillAtTheEnd()), max_steps=max_steps)
    for _ in range(2):
        again = run(tmp_path, callbacks(), True, max_steps=max_steps)
        for logged in (again.state.log_history, lines(tmp_path / "log.jsonl")):
            assert [entry["step"] for entry in logged if "eval_noise" in entry] == sorted({0, 3, max_steps})


def test_evaluations_know_their_own_metrics(tmp_path):
    """Among those of the trainer and of another callback, at the same steps; also where a run goes on."""

    def callbacks():
        return [
            EvaluationCallback(lambda model: {"often": 1.0}, every=1),
            EvaluationCallback(lambda model: {"seldom": 1.0}, every=3, stop=lambda metrics: metrics["seldom"] < 0),
        ]

    items = [{Role.FORGET: FORGET[0], Role.RETAIN: RETAIN[0]}]
    options = {"eval_dataset": items, "eval_strategy": "steps", "eval_steps": 1, "save_steps": 1}
    stopped = run(tmp_path, [_Stop(), *callbacks()], max_steps=4, **options)
    assert stopped.state.global_step == 2
    again = run(tmp_path, callbacks(), True, max_steps=4, **options)
    for done, steps in ((stopped, [0, 2]), (again, [0, 3, 4])):
        assert [entry["step"] for entry in done.state.log_history if "eval_seldom" in entry] == steps


class _Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == 2


@pytest.mark.parametrize("every", [0, -1, "step", 1.5])
def test_intervals_that_are_none(every):
    with pytest.raises(ValueError, match=r'every must be "epoch" or a positive number of steps, got'):
        EvaluationCallback(measured, every)


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "optimizer.pt", "rng_state.pth", "trainer_state.json"])
def test_a_truncated_checkpoint_is_passed_over(tmp_path, file):
    whole = run(tmp_path, [], save_steps=1, max_steps=3)
    newest = tmp_path / "checkpoint-3"
    assert last_whole_checkpoint(tmp_path) == str(newest)
    (newest / file).write_bytes((newest / file).read_bytes()[:-20])
    assert checkpoint_fault(newest) == f"{file} is cut short"
    assert last_whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    with pytest.raises(ValueError, match=rf"cannot resume from .*checkpoint-3: {file} is cut short"):
        run(tmp_path, [], resume=str(newest))
    resumed = run(tmp_path, [], resume=True, max_steps=3, save_steps=1)
    expected = trained_weights(whole.model)
    assert all(torch.equal(weight, expected[name]) for name, weight in trained_weights(resumed.model).items())
    assert checkpoint_fault(newest) is None


def test_no_checkpoint_to_resume_from(tmp_path):
    (tmp_path / "checkpoint-1").mkdir()
    with pytest.raises(ValueError, match=r"has no checkpoint to resume from"):
        run(tmp_path, [], resume=True)
    assert checkpoint_fault(tmp_path / "checkpoint-1") == "it has no trainer_state.json, which is written last"
