"""Which plots a report has: those whose metrics exist."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from matplotlib.figure import Figure

from loku.report import bars, curves
from loku.report.grouping import Group
from loku.report.metrics import Metric, cost_label, evidence, metric, ordered
from loku.report.style import style, svg, unwritable


@dataclass(frozen=True)
class Panel:
    """A plot as an ``<svg>`` element, and what it shows in words."""

    alt: str
    svg: str


@dataclass(frozen=True)
class Section:
    title: str
    note: str
    panels: list[Panel]


Drawn = tuple[str, Figure]


def sections(groups: Sequence[Group]) -> list[Section]:
    """Those that have at least one plot."""
    parts = (
        ("Extraction before and after", "Bars: mean; whiskers: standard deviation over seeds.", _extraction(groups)),
        (
            "Forgetting and utility over steps",
            "Thick: mean at the steps that all runs of a group have; thin: each run. Dashed: what counts as forgotten. "
            "Values that are not finite are left out.",
            _over_steps(groups),
        ),
        (
            "Forget quality against model utility",
            "One mark an evaluation, larger with time; hollow: the model as given. Upper right is better. Above the "
            "dashed line, a Kolmogorov-Smirnov test cannot tell the model from one that never saw the forget set.",
            _quality_against_utility(groups),
        ),
        (
            "Forgetting against utility",
            "One mark an evaluation, larger with time; hollow: the model as given.",
            _forgetting_against_utility(groups),
        ),
        ("Speed and memory", "Bars: mean; whiskers: standard deviation over seeds.", _costs(groups)),
    )
    if lacking := unwritable("".join(group.label for group in groups)):
        warnings.warn(f"no font here has {lacking}, of which the plots show boxes; the tables are whole", stacklevel=2)
    made = []
    with style():
        for number, (title, note, drawn) in enumerate(parts):
            panels = [Panel(alt, svg(figure, f"plot-{number}-{i}")) for i, (alt, figure) in enumerate(drawn)]
            made.append(Section(title, note, panels))
    return [section for section in made if section.panels]


def _extraction(groups: Sequence[Group]) -> Iterator[Drawn]:
    keys = {key for group in groups for of in ("before", "after") for key in group.statistics(of)}
    for m in _of_role(keys, "forgetting"):
        if m.better == "lower":
            yield f"{m.label} before and after, by run", bars.before_and_after(groups, m)


def _over_steps(groups: Sequence[Group]) -> Iterator[Drawn]:
    logged = _logged(groups)
    for m in [*_of_role(logged, "forgetting"), *_of_role(logged, "utility")]:
        if any(len(path) > 1 for group in groups for path in group.logged(m.key)):
            yield f"{m.label} over steps, by run", curves.over_steps(groups, m)


def _quality_against_utility(groups: Sequence[Group]) -> Iterator[Drawn]:
    across, up = metric("model_utility"), metric("log10_forget_quality")
    if _any_path(groups, across, up):
        yield f"{up.label} against {across.label}, by run", curves.against(groups, across, up)


def _forgetting_against_utility(groups: Sequence[Group]) -> Iterator[Drawn]:
    keys = {key for group in groups for key in group.statistics("after")} | _logged(groups)
    across = metric("perplexity" if "perplexity" in keys else "retain_rouge")
    for m in _of_role(keys, "forgetting"):
        if m.better == "lower" and _any_path(groups, across, m):
            yield f"{m.label} against {across.label}, by run", curves.against(groups, across, m)


def _costs(groups: Sequence[Group]) -> Iterator[Drawn]:
    for key in dict.fromkeys(key for group in groups for key in group.statistics("costs")):
        yield f"{cost_label(key)}, by run", bars.costs(groups, key)


def _logged(groups: Sequence[Group]) -> set[str]:
    return {key for group in groups for run in group.runs for values in run.evaluations.values() for key in values}


def _of_role(keys: set[str], role: str) -> list[Metric]:
    return [m for m in evidence(ordered(keys)) if m.role == role]


def _any_path(groups: Sequence[Group], across: Metric, up: Metric) -> bool:
    return any(group.paths(across.key, up.key) for group in groups)
