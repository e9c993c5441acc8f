"""Runs that differ only in the seed are one group; statistics over its runs."""

from __future__ import annotations

import json
import math
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from loku.report.metrics import ABSENT
from loku.report.run import Run

# The seed, and what does not change a run's results: where files are, what is written when.
_NOT_COMPARED = frozenset(
    {"seed", "data_seed"}
    | {"data_dir", "output_dir", "overwrite_output_dir", "logging_dir", "run_name", "local_rank"}
    | {"resume", "resume_from_checkpoint", "logging_steps", "report_to", "disable_tqdm"}
    | {"save_strategy", "save_steps", "save_total_limit", "fisher_save_minutes"}
)
_ALWAYS_TOLD = ("model", "forget", "retain", "rank")  # where they differ, even between methods
_MOST_TOLD = 3

Point = tuple[float, ...]


class Statistic(NamedTuple):
    """Mean and sample standard deviation (None for one value) of a quantity over ``count`` runs."""

    mean: float
    std: float | None
    count: int


@dataclass(frozen=True)
class Group:
    """Runs with the same settings."""

    label: str
    runs: list[Run]

    @property
    def seeds(self) -> list[object]:
        return [run.config.get("seed") for run in self.runs]

    def statistics(self, of: Literal["before", "after", "costs", "thresholds"]) -> dict[str, Statistic]:
        values: dict[str, list[float]] = {}
        for run in self.runs:
            for key, value in getattr(run, of).items():
                values.setdefault(key, []).append(value)
        return {key: _statistic(numbers) for key, numbers in values.items()}

    def paths(self, *keys: str) -> list[dict[int, Point]]:
        """For each run that has them, the metrics ``keys`` at each step at which all are finite; at 0 and 1 stand those
        before and after where no step was logged."""
        paths = (_finite_points(run.evaluations, keys) for run in self.runs)
        ends = (_finite_points({0: run.before, 1: run.after}, keys) for run in self.runs)
        return [path or fallback for path, fallback in zip(paths, ends, strict=True) if path or fallback]

    def logged(self, key: str) -> list[dict[int, Point]]:
        """As `paths`, of one metric, where it was logged."""
        return [path for run in self.runs if (path := _finite_points(run.evaluations, (key,)))]


def mean_path(paths: Sequence[dict[int, Point]]) -> dict[int, Point]:
    """The mean of several paths, at the steps that all have."""
    common = set.intersection(*(set(path) for path in paths)) if paths else set()
    return {step: tuple(map(statistics.fmean, zip(*(p[step] for p in paths), strict=True))) for step in sorted(common)}


def group_runs(runs: Iterable[Run]) -> list[Group]:
    """Groups in the order of their first runs, each with a label of its own: the method, and the settings in which it
    differs from the others, or a number."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(json.dumps(_settings(run), sort_keys=True), []).append(run)
    members = list(groups.values())
    return [Group(label, group) for label, group in zip(_labels(members), members, strict=True)]


def differing_settings(groups: Sequence[Group]) -> dict[str, list[str]]:
    """For each setting other than the method that is not the same in all groups, its value in each."""
    settings = [_settings(group.runs[0]) for group in groups]
    keys = dict.fromkeys(key for of_group in settings for key in of_group if key != "method")  # the label has it
    values = {key: [of_group.get(key, ABSENT) for of_group in settings] for key in keys}
    return {key: column for key, column in values.items() if len(set(column)) > 1}


def common_settings(groups: Sequence[Group]) -> dict[str, str]:
    """The settings that all groups share."""
    first, *others = [_settings(group.runs[0]) for group in groups]
    return {key: value for key, value in first.items() if all(other.get(key) == value for other in others)}


def _settings(run: Run) -> dict[str, str]:
    compared = {k: v for k, v in run.config.items() if k not in _NOT_COMPARED and not str(k).startswith("_")}
    return {key: value if isinstance(value, str) else _as_text(value) for key, value in compared.items()}


def _as_text(value: object) -> str:
    """Whole numbers without a fraction: a run that went on read its own 0 as 0.0."""
    whole = isinstance(value, float) and value.is_integer()
    return json.dumps(int(value) if whole else value, sort_keys=True, default=str)


def _labels(members: Sequence[Sequence[Run]]) -> list[str]:
    settings = [_settings(runs[0]) for runs in members]
    labels = []
    for runs, own in zip(members, settings, strict=True):
        method = own.get("method", runs[0].name)
        told = [key for key in _ALWAYS_TOLD if len({other.get(key) for other in settings}) > 1]
        alike = [other for other in settings if other.get("method") == own.get("method")]
        for key in own:  # until nothing else has this label
            alike = [other for other in alike if all(other.get(k) == own.get(k) for k in told)]
            if key not in told and any(other.get(key) != own[key] for other in alike):
                told.append(key)
        told = [key for key in told[:_MOST_TOLD] if key in own]
        details = [f"{key} {_tail(own[key], {other.get(key, '') for other in settings})}" for key in told]
        labels.append(", ".join([method, *details]))
    counts, seen = Counter(labels), Counter()
    for i, label in enumerate(labels):
        seen[label] += 1
        labels[i] = label if counts[label] == 1 else f"{label} ({seen[label]})"
    return labels


def _tail(path: str, others: set[str]) -> str:
    """The shortest end of a path that none of the others has, or all of it."""
    parts = path.rstrip("/").split("/")
    tails = ["/".join(parts[-depth:]) for depth in range(1, len(parts) + 1)]
    ends = tuple(f"/{other.rstrip('/')}" for other in others - {path})
    return next((tail for tail in tails if not any(end.endswith(f"/{tail}") for end in ends)), tails[-1])


def _statistic(values: Sequence[float]) -> Statistic:
    if len(values) == 1:
        return Statistic(values[0], None, 1)
    if not all(map(math.isfinite, values)):
        return Statistic(sum(values) / len(values), math.nan, len(values))
    return Statistic(statistics.fmean(values), statistics.stdev(values), len(values))


def _finite_points(evaluations: dict[int, dict[str, float]], keys: Sequence[str]) -> dict[int, Point]:
    points = {step: tuple(v[key] for key in keys) for step, v in evaluations.items() if all(key in v for key in keys)}
    return {step: point for step, point in points.items() if all(map(math.isfinite, point))}
