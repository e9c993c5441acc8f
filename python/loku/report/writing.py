"""The report's files."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from loku.files import replacing
from loku.report.grouping import Group, common_settings, group_runs
from loku.report.panels import sections
from loku.report.run import Run
from loku.report.tables import all_tables, escape_markdown, load_runs, markdown, versions_table

_NOTE = (
    "↓ lower is better, ↑ higher. ± is the sample standard deviation over runs that differ only in the seed; "
    "it is left out where they agree."
)


def write_report(
    runs: Sequence[Run | str | os.PathLike], out_dir: str | os.PathLike, title: str = "Unlearning report"
) -> Path:
    """Writes ``report.json``, ``report.md`` and ``report.html`` (one self-contained page), and returns the page's path.

    Runs that differ only in the seed are grouped: mean and sample standard deviation. Of forget quality, a p-value, the
    statistics are those of log10 p. Numbers that JSON lacks are the strings "inf", "-inf" and "nan" in ``report.json``.

    Args:
        runs: runs, or their folders; at least one.
        out_dir: made if it does not exist; files of the same names are replaced.
        title: of the report.

    Raises:
        ValueError, FileNotFoundError: no run, or a folder that `Run.load` refuses.
    """
    runs = load_runs(runs)
    groups = group_runs(runs)
    out_dir = Path(out_dir)
    files = {
        "report.json": json.dumps(_jsonable(_as_dict(groups, title)), indent=2, allow_nan=False) + "\n",
        "report.md": _as_markdown(groups, runs, title),
        "report.html": _as_html(groups, runs, title),
    }
    for name, text in files.items():
        with replacing(out_dir / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return out_dir / "report.html"


def _as_dict(groups: Sequence[Group], title: str) -> dict[str, Any]:
    return {"title": title, "groups": [_group_as_dict(group) for group in groups]}


def _group_as_dict(group: Group) -> dict[str, Any]:
    kinds = ("before", "after", "thresholds", "costs")
    statistics = {of: {key: s._asdict() for key, s in group.statistics(of).items()} for of in kinds}
    return {"label": group.label, **statistics, "runs": [_run_as_dict(run) for run in group.runs]}


def _run_as_dict(run: Run) -> dict[str, Any]:
    kinds = ("before", "after", "thresholds", "costs", "config", "versions")
    return {"folder": str(run.folder), "finished": run.finished} | {of: getattr(run, of) for of in kinds}


def _as_markdown(groups: Sequence[Group], runs: Sequence[Run], title: str) -> str:
    heading = f"# {escape_markdown(title)}"
    tables = [markdown(table) for table in (*all_tables(groups), versions_table(runs)) if table.rows]
    return "\n\n".join([heading, *tables, _NOTE]) + "\n"


def _as_html(groups: Sequence[Group], runs: Sequence[Run], title: str) -> str:
    # From the text, not by a loader, because the package may be in a zip file. Everything put in is escaped.
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(resources.files("loku.report").joinpath("report.html.j2").read_text("utf-8"))
    return template.render(
        title=title,
        note=_NOTE,
        tables=all_tables(groups),
        sections=sections(groups),
        settings=common_settings(groups),
        versions=versions_table(runs),
        folders=[(group.label, [str(run.folder) for run in group.runs]) for group in groups],
    )


def _jsonable(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_jsonable(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if isinstance(value, (str, int, float, type(None))) else str(value)
