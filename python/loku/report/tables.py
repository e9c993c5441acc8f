"""Tables of groups of runs: for the terminal, for Markdown, and for the HTML page."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.box import SIMPLE_HEAVY
from rich.markup import escape
from rich.table import Column
from rich.table import Table as RichTable
from rich.text import Text

from loku.report.grouping import Group, Statistic, differing_settings, group_runs
from loku.report.metrics import ABSENT, Metric, cost_label, evidence, ordered, show
from loku.report.run import Run


@dataclass(frozen=True)
class Table:
    """Cells of text; the first column names the group."""

    title: str
    header: list[str]
    rows: list[list[str]]


def summary_table(runs: Sequence[Run | str | os.PathLike], title: str = "Before → after") -> RichTable:
    """Metrics before → after, time and memory of each group of runs that differ only in the seed, for the terminal.

    A row a metric and a column a group: there are more metrics than methods to compare, and terminals are narrow.

    Args:
        runs: runs, or their folders; at least one.
        title: of the table.

    Raises:
        ValueError: no run, or a folder that `Run.load` refuses.
    """
    groups = group_runs(load_runs(runs))
    parts = [results_table(groups), costs_table(groups, ("seconds", "peak_memory_mib"))]
    columns = [Column(Text(group.label), justify="right", overflow="fold") for group in groups]
    columns = [Column("Run", no_wrap=True), *columns]
    table = RichTable(*columns, title=escape(title), box=SIMPLE_HEAVY, padding=(0, 1, 0, 0))
    arrow = " →" if len(groups) <= 2 else "\n→"
    for part in parts:
        for name, *cells in list(zip(part.header, *part.rows, strict=True))[1:]:
            table.add_row(Text(name), *(Text(cell.replace(" →", arrow)) for cell in cells))
    return table


def load_runs(runs: Sequence[Run | str | os.PathLike]) -> list[Run]:
    """Runs as they are, folders loaded; each folder once, under whichever of its paths came first: a run that is given
    twice is no second seed. Raises ValueError if there is none."""
    if isinstance(runs, (str, os.PathLike, Run)) or not len(runs):
        raise ValueError(f"runs must be a sequence of at least one run or run folder, got {runs!r}")
    by_folder: dict[Path, Run] = {}
    for run in (run if isinstance(run, Run) else Run.load(run) for run in runs):
        by_folder.setdefault(run.folder.resolve(), run)
    return list(by_folder.values())


def all_tables(groups: Sequence[Group]) -> list[Table]:
    """Those that have something to say."""
    tables = [results_table(groups), costs_table(groups), others_table(groups), settings_table(groups)]
    return [table for table in tables if len(table.header) > 1]


def results_table(groups: Sequence[Group]) -> Table:
    metrics = evidence(_metrics(groups))
    arrows = {"lower": " ↓", "higher": " ↑", None: ""}
    header = ["Run", "Runs", *(m.label + arrows[m.better] for m in metrics)]
    rows = [[group.label, _count(group), *_before_after(group, metrics)] for group in groups]
    return Table("Before → after", header, rows)


def others_table(groups: Sequence[Group]) -> Table:
    metrics = _metrics(groups)
    shown = evidence(metrics)
    metrics = [m for m in metrics if m not in shown]
    rows = [[group.label, *_before_after(group, metrics)] for group in groups]
    return Table("Other metrics, before → after", ["Run", *(m.label for m in metrics)], rows)


def costs_table(groups: Sequence[Group], only: Sequence[str] | None = None) -> Table:
    costs = [group.statistics("costs") for group in groups]
    keys = [key for key in dict.fromkeys(key for of_group in costs for key in of_group) if only is None or key in only]
    rows = [
        [group.label, *(_cell(of_group.get(key), group) for key in keys)]
        for group, of_group in zip(groups, costs, strict=True)
    ]
    return Table("Speed and memory", ["Run", *map(cost_label, keys)], rows)


def settings_table(groups: Sequence[Group]) -> Table:
    differing = differing_settings(groups)
    rows = [[group.label, *(column[i] for column in differing.values())] for i, group in enumerate(groups)]
    return Table("Settings that differ", ["Run", *differing], rows)


def versions_table(runs: Sequence[Run]) -> Table:
    keys = dict.fromkeys(key for run in runs for key in run.versions)
    found = {key: dict.fromkeys(str(run.versions[key]) for run in runs if key in run.versions) for key in keys}
    return Table("Versions", ["Of", "Version"], [[key, ", ".join(values)] for key, values in found.items()])


def markdown(table: Table) -> str:
    lines = [table.header, ["---", *["---:"] * (len(table.header) - 1)], *table.rows]
    escaped = [[cell if i == 1 else escape_markdown(cell) for cell in line] for i, line in enumerate(lines)]
    return "\n".join([f"## {table.title}", "", *(f"| {' | '.join(line)} |" for line in escaped)])


def _metrics(groups: Sequence[Group]) -> list[Metric]:
    return ordered({key for group in groups for of in ("before", "after") for key in group.statistics(of)})


def _before_after(group: Group, metrics: Sequence[Metric]) -> list[str]:
    before, after = group.statistics("before"), group.statistics("after")
    cells = []
    for key in (m.key for m in metrics):
        neither = key not in before and key not in after
        arrow = f"{_cell(before.get(key), group)} → {_cell(after.get(key), group)}"
        cells.append(ABSENT if neither else arrow)
    return cells


def _cell(statistic: Statistic | None, group: Group) -> str:
    if statistic is None:
        return ABSENT
    of = f" ({statistic.count} of {len(group.runs)})" if statistic.count < len(group.runs) else ""
    return show(statistic.mean, statistic.std) + of


def _count(group: Group) -> str:
    unfinished = sum(not run.finished for run in group.runs)
    return str(len(group.runs)) + (f" ({unfinished} unfinished)" if unfinished else "")


def escape_markdown(text: str) -> str:
    """On one line, with nothing that Markdown or HTML reads as more than text."""
    return re.sub(r"([\\`*_\[\]<>|#~])", r"\\\1", " ".join(text.split()))
