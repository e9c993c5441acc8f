"""TOFU's evaluation logs: task -> metric -> sample's index as a string -> value, one JSON file."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
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
    """Raises ValueError unless the log has a known task, and each of those every metric, for the same samples."""
    tasks = set(TASKS.values()).intersection(log) if isinstance(log, Mapping) else ()
    if not tasks:
        raise ValueError(f"a TOFU log has tasks named {', '.join(TASKS.values())}; this has none of them")
    for task in tasks:
        samples = log[task].get("avg_gt_loss", {}).keys()
        if not samples:
            raise ValueError(f"{task} has no samples in avg_gt_loss")
        for metric in _NEEDED:
            if log[task].get(metric, {}).keys() != samples:
                raise ValueError(f"{task} lacks {metric}, or has it for other samples than avg_gt_loss")
