"""``loku report``: one run, or several beside each other, as a table and a page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console

from loku.cli.errors import CommandError, blaming, warn
from loku.cli.options import option, parse
from loku.report import Run, summary_table, write_report
from loku.report.grouping import group_runs
from loku.report.tables import load_runs


@dataclass
class ReportRun:
    """Which runs, and where to."""

    runs: list[str] | None = option(None, "run folders; those that differ in the seed alone are averaged")
    output: str = option("report", "folder for report.json, report.md and report.html")
    title: str = option("Unlearning", "of the page")


def main(argv: list[str]) -> None:
    """Compare runs: before and after, over the steps, speed and memory."""
    (options,) = parse("report", [ReportRun], argv, main.__doc__)
    if not options.runs:
        raise CommandError("--runs is required: one run folder or several")
    with blaming():
        runs = load_runs(options.runs)
    _warn_of_repeated(runs)
    write_report(runs, options.output, title=options.title)
    Console().print(summary_table(runs))
    print(f"report written to {options.output}")


def _warn_of_repeated(runs: Sequence[Run]) -> None:
    for group in group_runs(runs):
        for seed, count in Counter(str(seed) for seed in group.seeds if seed is not None).items():
            if count > 1:
                warn(f"{count} runs of {group.label} have the seed {seed}: their spread is not that over seeds")
