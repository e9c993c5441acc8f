"""Watching a run: every log as a JSON line, and evaluations that may end it."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from loku.files import read_json_lines, write_json_lines, writing
from loku.inference import evaluation_mode

# Keys of what an evaluation keeps of itself in the trainer's state.
_PLACE, _METRICS = "evaluation_callback", "evaluation_metrics"


class TrainingIsOver(Exception):
    """Raised by a callback as an epoch begins, where the checkpoint gone on from was the end of the training.

    transformers would take a step before it asks. `UnlearningTrainer.train` heeds it.
    """


class JsonLinesCallback(TrainerCallback):
    """Writes what the trainer logs, evaluations too, as JSON lines: step, epoch, seconds of training, and the values.

    The process of rank 0 writes, and flushes each line. A run from the start begins the file anew; one that resumes
    keeps the lines up to its checkpoint, and counts seconds on. Values that are not finite become null.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path)
        self._begin = time.perf_counter()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero:
            return
        lines = read_json_lines(self.path) if state.global_step else []
        kept = [line for line in lines if line["step"] <= state.global_step]
        write_json_lines(self.path, kept)
        self._begin = time.perf_counter() - (kept[-1]["seconds"] if kept else 0.0)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not state.is_world_process_zero:
            return
        seconds = round(time.perf_counter() - self._begin, 3)
        line = {"step": state.global_step, "epoch": state.epoch, "seconds": seconds, **(logs or {})}
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
        with writing(self.path), self.path.open("a") as file:
            file.write(json.dumps(finite) + "\n")


class EvaluationCallback(TrainerCallback):
    """Calls ``evaluate(model)`` at step 0, at an interval and after the last step, and ends the training once
    ``stop(metrics)`` is true.

    The model is in evaluation mode without gradients meanwhile, and random numbers drawn by the evaluation are given
    back, so that the training is the same with and without it. The metrics and "runtime", the seconds it took, are
    logged by the trainer, with "eval_" before their names. Each process evaluates, and must come to the same metrics. A
    run that is stopped saves a checkpoint, unless ``save_strategy`` is "no". At step 0 ``stop`` is not asked. A resumed
    run is first evaluated at the next interval, but ``stop`` is asked about the metrics kept with its checkpoint, so
    that one that had reached its aim does not go on.

    Args:
        evaluate: model -> metrics.
        every: ``"epoch"``, or a number of optimiser steps.
        stop: metrics -> whether the aim is reached.

    Attributes:
        trainer, place: the trainer that logs, and the callback's place among its evaluations. `UnlearningTrainer` sets
            them; another, whose they must be set for, raises where a run goes on that had reached its aim. A run goes
            on with the evaluations that it began with, in their order.

    Raises:
        ValueError: every is neither.
    """

    trainer: Trainer
    place: int

    def __init__(
        self,
        evaluate: Callable[[nn.Module], Mapping[str, float]],
        every: Literal["epoch"] | int = "epoch",
        stop: Callable[[Mapping[str, float]], bool] | None = None,
    ) -> None:
        if every != "epoch" and not (isinstance(every, int) and every > 0):
            raise ValueError(f'every must be "epoch" or a positive number of steps, got {every!r}')
        self.evaluate, self.every, self.stop = evaluate, every, stop

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._first_step = state.global_step

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step == 0:  # all callbacks have begun by now, also those that write the log
            self._measure(state, control, kwargs["model"])
        elif self.stop is not None and state.global_step == self._first_step:
            metrics = self._measured(state)
            if metrics is not None and self.stop(metrics):
                raise TrainingIsOver

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Before the checkpoint of the same step, which then tells of the evaluation to a run that goes on."""
        ends_epoch = float(state.epoch).is_integer()
        due = ends_epoch if self.every == "epoch" else state.global_step % self.every == 0
        if due or state.global_step >= state.max_steps:
            self._measure_or_stop(args, state, control, kwargs["model"])

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """What no step was known to end: an epoch or a training that another callback ends."""
        if (self.every == "epoch" or control.should_training_stop) and self._measured(state) is None:
            self._measure_or_stop(args, state, control, kwargs["model"])

    def _measure_or_stop(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module
    ) -> None:
        metrics = self._measure(state, control, model)
        if self.stop is not None and self.stop(metrics):
            control.should_training_stop = True
            control.should_save = args.save_strategy != "no"

    def _measure(self, state: TrainerState, control: TrainerControl, model: nn.Module) -> Mapping[str, float]:
        begin = time.perf_counter()
        with evaluation_mode(model) as device, torch.random.fork_rng([device] if device.type == "cuda" else []):
            measured = self.evaluate(model)
        # Checkpoints and logs are JSON, which knows Python's numbers only.
        metrics = {name: value.item() if hasattr(value, "item") else value for name, value in measured.items()}
        due = control.should_log
        logged = {**metrics, "runtime": round(time.perf_counter() - begin, 3)}
        self.trainer.log({f"eval_{name}": value for name, value in logged.items()})
        control.should_log = due  # which the trainer takes for done after any log
        # No log, but kept with checkpoints: what was logged may also be the trainer's own or another callback's.
        state.log_history.append({"step": state.global_step, _PLACE: self.place, _METRICS: metrics})
        return metrics

    def _measured(self, state: TrainerState) -> Mapping[str, float] | None:
        """The metrics of this callback's evaluation at the current step, if there was one."""
        here = (entry for entry in state.log_history if entry["step"] == state.global_step)
        return next((entry[_METRICS] for entry in here if entry.get(_PLACE) == self.place), None)
