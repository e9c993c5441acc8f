"""A run folder, as the commands of `loku` write it."""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from loku.report.metrics import with_logarithm

_PREFIX = "eval_"
_NO_EVALUATION = re.compile(r"eval_(runtime|\w+_per_second)")  # what transformers' Trainer adds to an evaluation
_COST = re.compile(r"(\w+_)?(seconds|mib|per_second|epochs|steps)")


@dataclass(frozen=True, eq=False)
class Run:
    """What one run was told, and what it measured.

    Attributes:
        folder: where it was read from.
        config: every argument, resolved (``config.yaml``).
        versions: of the programs and the hardware (``versions.json``); empty if there is no such file.
        metrics: what was logged (``metrics.jsonl``), one mapping a step, by step; none of an evaluation.
        results: ``results.json``, or None for a run that has not come to its end.
    """

    folder: Path
    config: dict[str, Any]
    versions: dict[str, Any]
    metrics: list[dict[str, Any]]
    results: dict[str, Any] | None

    @classmethod
    def load(cls, folder: str | os.PathLike) -> Run:
        """Reads a run folder. The last line of ``metrics.jsonl``, where a kill has truncated it, is skipped with a
        warning.

        Raises:
            FileNotFoundError: no such folder, no ``config.yaml``, or neither ``metrics.jsonl`` nor ``results.json``.
            ValueError: a file is not what it should be; says which, and the line.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise FileNotFoundError(f"folder must be a run folder, but {folder} does not exist")
        if not (folder / "config.yaml").is_file():
            raise FileNotFoundError(f"{folder} has no config.yaml, so it is not the folder of a run")
        logged, results = folder / "metrics.jsonl", folder / "results.json"
        if not logged.is_file() and not results.is_file():
            raise FileNotFoundError(f"{folder} has neither metrics.jsonl nor results.json: nothing was measured yet")
        rows = _read_lines(logged) if logged.is_file() else []
        run = cls(
            folder=folder,
            config=_read_yaml(folder / "config.yaml"),
            versions=_read_json(folder / "versions.json") if (folder / "versions.json").is_file() else {},
            metrics=_by_step(rows, logged) if any("step" in row for row in rows) else [],
            results=_read_json(results) if results.is_file() else None,
        )
        # Other commands log no steps, but texts, tasks, modules or files: what an evaluation found is in its results.
        if rows and not run.metrics and "after" not in (run.results or {}):
            raise ValueError(
                f"{folder} must be the folder of a training or of an evaluation that was finished, but {logged.name} "
                "has no 'step' and there is no 'after' in results.json"
            )
        for key in ("before", "after", "thresholds"):
            if run.results is not None and not isinstance(run.results.get(key, {}), Mapping):
                raise ValueError(f"{results}: {key!r} must map metrics to numbers, but is {run.results[key]!r}")
        return run

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def finished(self) -> bool:
        return self.results is not None

    @property
    def evaluations(self) -> dict[int, dict[str, float]]:
        """Metrics (without the prefix ``eval_``) at each step at which the model was evaluated; those that were not
        finite, which the log has as null, are left out."""
        return {step: with_logarithm(_numbers(values)) for step, values in self._evaluated().items()}

    @property
    def not_finite(self) -> list[str]:
        """Metrics of the last evaluation that were not finite."""
        values = self._evaluated()
        return [key for key, value in values[max(values)].items() if value is None] if values else []

    @property
    def before(self) -> dict[str, float]:
        """Metrics of the model that was given: from the results, else those logged at step 0."""
        return self._from_results("before") or self.evaluations.get(0, {})

    @property
    def after(self) -> dict[str, float]:
        """Metrics of the unlearned model: from the results, else the last that were logged after step 0."""
        return self._from_results("after") or self.last_evaluation

    @property
    def last_evaluation(self) -> dict[str, float]:
        """The metrics that were last logged after step 0."""
        evaluations = self.evaluations
        last = max(evaluations, default=0)
        return evaluations[last] if last > 0 else {}

    @property
    def thresholds(self) -> dict[str, float]:
        """Values that count as forgotten, such as those of the same model on unseen sequences, where results have
        them."""
        return self._from_results("thresholds")

    @property
    def costs(self) -> dict[str, float]:
        """Time, memory, speed and length of the run: the numbers in the results with such a name."""
        return _numbers({key: value for key, value in (self.results or {}).items() if _COST.fullmatch(key)})

    def _evaluated(self) -> dict[int, dict[str, Any]]:
        found = {}
        for row in self.metrics:
            keys = [key for key in row if key.startswith(_PREFIX) and not _NO_EVALUATION.fullmatch(key)]
            if keys:
                found[row["step"]] = {key.removeprefix(_PREFIX): row[key] for key in keys}
        return found

    def _from_results(self, key: str) -> dict[str, float]:
        return with_logarithm(_numbers((self.results or {}).get(key, {})))


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    return {k: float(v) for k, v in values.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    return _mapping(values, str(path))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return _mapping(json.loads(path.read_text(encoding="utf-8")), str(path))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error


def _read_lines(path: Path) -> list[dict[str, Any]]:
    lines = path.read_bytes().splitlines()
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            rows.append(_mapping(json.loads(line), where))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            if number < len(lines):
                raise ValueError(f"{where} is not valid JSON: {error}") from error
            warnings.warn(f"{where} is truncated, as a killed run leaves it, and is skipped", stacklevel=3)
    return rows


def _by_step(rows: list[dict[str, Any]], path: Path) -> list[dict[str, Any]]:
    """One mapping a step. Where a resumed run goes back, what the killed one had logged beyond is forgotten."""
    steps: dict[int, dict[str, Any]] = {}
    for row in rows:
        step = row.get("step")
        if not isinstance(step, int):
            raise ValueError(f"{path}: every line must have an integer 'step', but one has {step!r}: {row}")
        steps = {earlier: merged for earlier, merged in steps.items() if earlier <= step}
        steps[step] = {**steps.get(step, {}), **row}
    return list(steps.values())


def _mapping(values: Any, where: str) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise ValueError(f"{where} must hold a mapping, but holds a {type(values).__name__}")
    return values
