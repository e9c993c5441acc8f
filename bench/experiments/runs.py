"""What the experiments share: `loku` commands, run again only where they did not come to their end, and figures."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from loku.cli import main
from loku.cli.run_folder import run_stage
from loku.report import Run
from loku.report.curves import against
from loku.report.grouping import group_runs
from loku.report.metrics import metric
from loku.report.style import style


def model_config(given: Path | None, usual: Mapping[str, Any], output: Path) -> Path:
    """The file given, or one in ``output`` that says what is usual."""
    if given is not None:
        return given
    path = output / "model.json"
    path.write_text(json.dumps(usual, indent=1))
    return path


def precision() -> tuple[str, ...]:
    """Options of training: bfloat16 on a GPU."""
    return ("--bf16", "true") if torch.cuda.is_available() else ()


def command(folder: Path, name: str, *arguments: object) -> None:
    """``loku name ... --output_dir folder``, unless its results are there; goes on where it was broken off."""

    def run(words: list[str]) -> None:
        print("loku", shlex.join([name, *words]), flush=True)
        if main([name, *words]) != 0:
            raise SystemExit(1)

    run_stage(run, folder, *arguments)


def report(runs: Sequence[Path], output: Path, title: str, figures: Sequence[tuple[str, str]]) -> None:
    """``loku report``, and of each (across, up) of ``figures`` a PNG beside it, of one metric against the other."""
    main(["report", "--runs", *map(str, runs), "--output", str(output), "--title", title])
    groups = group_runs([Run.load(run) for run in runs])
    with style():
        for across, up in figures:
            figure = against(groups, metric(across), metric(up))
            figure.savefig(output / f"{up}-against-{across}.png", dpi=200)
