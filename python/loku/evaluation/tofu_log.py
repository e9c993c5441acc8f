"""TOFU's evaluation logs: task -> metric -> sample's index as a string -> value, one JSON file."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from numbers import Real
from pathlib import Path
from typing import Any

from loku.files import replacing

TofuLog = dict[str, dict[str, dict[str, Any]]]

TASKS = {
    "retain": "eval_log.json",
    "real_authors": "eval_real_author_wo_options.json",
    "world_facts": "eval_real_world_wo_options.json",
    "forget": "eval_log_forget.json",
}
"""Part of the evaluation -> name of its task in a log."""

_NEEDED = ("avg_gt_loss", "avg_paraphrased_loss", "average_perturb_loss", "rougeL_recall")


def read_log(path: str | os.PathLike) -> TofuLog:
    """A log as published with TOFU, or as `write_log` wrote it.

    Raises:
        ValueError: the file is no JSON, holds no task that is known, or a task lacks a metric that the aggregates need
            or has it for other samples.
    """
    try:
        log = json.loads(Path(path).read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not a JSON file: {error}") from error
    try:
        check_log(log)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return log


def write_log(log: Mapping[str, Any], path: str | os.PathLike) -> None:
    """Writes the log, indented as published, under a temporary name first."""
    check_log(log)
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(log, indent=4))


def check_log(log: Any) -> None:
    """Raises ValueError unless the log has a known task, and each of those every metric, for the same samples, as
    numbers."""
    tasks = set(TASKS.values()).intersection(log) if isinstance(log, Mapping) else ()
    if not tasks:
        raise ValueError(f"a TOFU log has tasks named {', '.join(TASKS.values())}; this has none of them")
    for task in tasks:
        if not isinstance(log[task], Mapping):
            raise ValueError(f"{task} must map metrics to their samples, got {type(log[task]).__name__}")
        samples = _samples(log, task, "avg_gt_loss")
        if not samples:
            raise ValueError(f"{task} has no samples in avg_gt_loss")
        for metric in _NEEDED:
            found = _samples(log, task, metric)
            if found.keys() != samples.keys():
                raise ValueError(f"{task} lacks {metric}, or has it for other samples than avg_gt_loss")
            for sample, value in found.items():
                _check_value(value, f"{task}, {metric}, sample {sample}", several=metric == "average_perturb_loss")


def _samples(log: Mapping[str, Any], task: str, metric: str) -> Mapping[str, Any]:
    found = log[task].get(metric, {})
    if not isinstance(found, Mapping):
        raise ValueError(f"{task}, {metric} must map samples to values, got {type(found).__name__}")
    return found


def _check_value(value: Any, place: str, several: bool) -> None:
    numbers = value if several else [value]
    if not isinstance(numbers, list) or not numbers or not all(isinstance(number, Real) for number in numbers):
        raise ValueError(f"{place} must be {'a list of numbers' if several else 'a number'}, got {value!r}")
