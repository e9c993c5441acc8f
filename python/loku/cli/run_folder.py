"""What a command leaves behind: configuration, versions, metrics and results."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from transformers import TrainerState

from loku.cli.errors import CommandError, blaming, warn
from loku.cli.options import ModelOptions
from loku.cli.settings_files import dump, read_mapping
from loku.fila.progress import peak_memory
from loku.files import read_json_lines, replacing, write_json, write_json_lines
from loku.provenance import commit, hardware, versions
from loku.report import Run

_EVIDENCE = (
    "importance*.safetensors*", "eval_log*.json", "metrics.jsonl", "results.json",
    "checkpoint-*", "adapter", "model", "corpus",
)  # fmt: skip
_BEGINNING = ("config.yaml", "versions.json")
_RECORDS = ("versions.json", "metrics.jsonl", "results.json")
_PACKAGES = ("loku-kernels", "torch", "transformers", "peft", "accelerate", "triton")

# Of `UnlearnConfig`, what makes a training another one: a checkpoint's schedule goes on at its own learning rate.
TRAINING_SETTLED = ("method", "seed", "data_seed", "learning_rate", "retain_weight", "beta", "gamma")


class RunFolder:
    """A command's folder: config.yaml, versions.json, metrics.jsonl, results.json, checkpoints, adapter/.

    Of several processes one ``writes``; the others read what it wrote.

    Args:
        resume: whether to go on with what is there.
        outputs: patterns of what the command writes besides its records.
        source: what it reads, and must leave as it is.

    Raises CommandError if ``path`` holds a run already and ``resume`` is not asked for, or holds what is no run's and
    would be replaced.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        resume: bool = False,
        writes: bool = True,
        outputs: Sequence[str] = (),
        source: ModelOptions | None = None,
    ) -> None:
        self.path, self.writes = Path(path), writes
        if not writes:
            return
        if not self._holds_a_run():
            if source is not None:
                self._check_source(source, outputs)
            self._check_foreign(outputs)
        elif not resume:
            raise CommandError(
                f"--output_dir {self.path} holds a run already: choose another folder, or go on with --resume"
            )

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def begin(self, config: Mapping[str, Any], settled: Iterable[str] = ()) -> None:
        """Write what the run was told and what it runs on.

        ``settled``: the options that must be as it was, where a run goes on. Raises CommandError if it is not.
        """
        if not self.writes:
            return
        plain = _plain(config)
        if self._holds_a_run():
            earlier = read_mapping(self / "config.yaml", "output_dir's")
            for key in settled:
                if plain.get(key) != earlier.get(key):
                    raise CommandError(
                        f"the run in {self.path} began with {key} = {earlier.get(key)}, and cannot go on with "
                        f"{plain.get(key)}"
                    )
        with replacing(self / "config.yaml") as temporary:
            temporary.write_text(dump(plain))
        write_json(self / "versions.json", {**versions(_PACKAGES), "hardware": hardware(), "commit": commit()})

    def _holds_a_run(self) -> bool:
        """Not where a start came to nothing: it may be tried again."""
        return (self / "config.yaml").exists() and any(any(self.path.glob(name)) for name in _EVIDENCE)

    def _check_source(self, source: ModelOptions, outputs: Sequence[str]) -> None:
        folder = self.path.resolve()
        for path in map(Path, filter(None, (source.model, *(source.adapter or [])))):
            if not path.exists() or not path.resolve().is_relative_to(folder):  # a name on the hub, or elsewhere
                continue
            inside = path.resolve().relative_to(folder).parts
            if not inside or any(fnmatch(inside[0], name) for name in outputs):
                raise CommandError(
                    f"--output_dir {self.path} would replace {path}, which is read and must stay as it is: choose "
                    "another folder"
                )

    def _check_foreign(self, outputs: Sequence[str]) -> None:
        if all((self / name).exists() for name in _BEGINNING):
            return
        found = {path.name for name in (*_RECORDS, *outputs) for path in self.path.glob(name)} - {"config.yaml"}
        if found:
            raise CommandError(
                f"--output_dir {self.path} is not the folder of a run, which begins with {' and '.join(_BEGINNING)}, "
                f"and {', '.join(sorted(found)[:3])} in it could be replaced: choose another folder"
            )

    def lines(self) -> list[dict[str, Any]]:
        """The metrics so far, in order."""
        with blaming():
            return read_json_lines(self / "metrics.jsonl")

    def add_line(self, metrics: Mapping[str, Any]) -> None:
        write_json_lines(self / "metrics.jsonl", [*self.lines(), metrics])

    def write_results(self, results: Mapping[str, Any]) -> None:
        """Metrics of the model that the run ends with that are not finite become null, with a warning that says so."""
        after = results.get("after", {})
        lost = [name for name, value in after.items() if value is not None and not math.isfinite(value)]
        if lost:
            results = {**results, "after": {**after, **dict.fromkeys(lost)}}
            warn(f"{', '.join(lost)}: not finite, and null in results.json")
        write_json(self / "results.json", results)


def run_stage(main: Callable[[list[str]], Any], folder: Path, *arguments: object) -> None:
    """Run a command as a part of something longer, unless its results are there; go on where it was broken off."""
    if (folder / "results.json").exists():
        return
    resume = ["--resume"] if (folder / "config.yaml").exists() else []
    main([*map(str, arguments), "--output_dir", str(folder), *resume])


def costs_of(run: Run, state: TrainerState, others: Mapping[str, float] = {}) -> dict[str, float]:
    """Steps, epochs, time and memory of a training run, over all its starts.

    ``seconds`` is all of it: the ``others``, what happened before the training, and the training with the evaluations
    along the way. ``training_seconds`` is without those, and ``tokens_per_second`` (padding not counted) is over it.
    What a start did after the checkpoint that the next one went on from is not counted, as it was done again.
    """
    logged = run.metrics[-1]["seconds"] if run.metrics else 0.0
    evaluation = sum(line.get("eval_runtime", 0.0) for line in run.metrics)
    training = logged - evaluation
    costs = {
        "steps": state.global_step,
        "epochs": state.epoch,
        "seconds": logged + sum(others.values()),
        **others,
        "evaluation_seconds": evaluation,
        "training_seconds": training,
        "peak_memory_mib": peak_memory() / 2**20,
    }
    if training > 0 and state.num_input_tokens_seen:
        costs["tokens_per_second"] = state.num_input_tokens_seen / training
    return costs


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """What JSON and YAML know, and was given or has a default."""
    return json.loads(json.dumps({key: value for key, value in config.items() if value is not None}, default=str))
