"""Metrics over steps, and one metric against another while a model is unlearned."""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from loku.report.grouping import Group, Point, mean_path
from loku.report.labels import End, heights, label_ends
from loku.report.metrics import Metric, show
from loku.report.style import FAINT, colour, figure, line, marker

_HEIGHT = 190  # points
_SIGNIFICANT = 0.05


def over_steps(groups: Sequence[Group], metric: Metric) -> Figure:
    """A thin line for each run and a thick one for each group's mean, at the steps that all its runs have."""
    thresholds = _thresholds(groups, metric)
    made, axes = figure(_height(groups), _title(metric, thresholds))
    ends = []
    for i, group in enumerate(groups):
        runs = group.logged(metric.key)
        for path in runs if len(runs) > 1 else ():
            axes.plot(*_columns(path, with_step=True), color=colour(i), linewidth=0.6, alpha=0.55)
        if runs:
            path = mean_path(runs) or runs[0]
            axes.plot(*_columns(path, with_step=True), color=colour(i), linestyle=line(i), marker=marker(i))
            ends.append(End(max(path), path[max(path)][0], group.label, colour(i)))
    axes.set_xlabel("Step")
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    _logarithmic_if_wide(axes.yaxis, axes.dataLim.intervaly, metric)
    _draw(axes, thresholds)
    label_ends(axes, ends)
    return made


def against(groups: Sequence[Group], across: Metric, up: Metric) -> Figure:
    """Each group's mean way from the model that was given (hollow) to the unlearned one (large), a mark an evaluation;
    the ends of its runs as small marks."""
    thresholds = _thresholds(groups, up)
    made, axes = figure(_height(groups) + 20, _title(up, thresholds))
    ends = []
    for i, group in enumerate(groups):
        runs = group.paths(across.key, up.key)
        if not runs:
            continue
        path = mean_path(runs) or runs[0]
        x, y = _columns(path)
        axes.plot(x, y, color=colour(i), linewidth=1)
        sizes = [14 + 26 * k / max(len(x) - 1, 1) for k in range(len(x))]
        fills = ["none" if step == 0 else colour(i) for step in path]
        axes.scatter(x, y, s=sizes, marker=marker(i), facecolors=fills, edgecolors=colour(i), linewidths=0.8, zorder=3)
        if len(runs) > 1:
            finals = [run[max(run)] for run in runs]
            axes.scatter(*zip(*finals, strict=True), s=7, marker=marker(i), color=colour(i), alpha=0.55, linewidths=0)
        ends.append(End(x[-1], y[-1], group.label, colour(i)))
    axes.set_xlabel(across.title)
    axes.margins(0.07)
    axes.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
    _logarithmic_if_wide(axes.xaxis, axes.dataLim.intervalx, across)
    _draw(axes, thresholds)
    label_ends(axes, ends)
    return made


def _thresholds(groups: Sequence[Group], metric: Metric) -> dict[float, str]:
    """Values that count as forgotten, and what to call them."""
    if metric.key == "log10_forget_quality":
        return {math.log10(_SIGNIFICANT): f"p = {_SIGNIFICANT}"}
    found = [group.statistics("thresholds").get(metric.key) for group in groups]
    return {s.mean: f"forgotten at {show(s.mean)}" for s in found if s is not None and math.isfinite(s.mean)}


def _title(metric: Metric, thresholds: dict[float, str]) -> str:
    return f"{metric.title}\ndashed: {', '.join(dict.fromkeys(thresholds.values()))}" if thresholds else metric.title


def _draw(axes: Axes, thresholds: dict[float, str]) -> None:
    for y in thresholds:
        axes.axhline(y, color=FAINT, linewidth=0.9, linestyle=(0, (4, 2)), zorder=1)


def _logarithmic_if_wide(axis: Axis, limits: Sequence[float], metric: Metric) -> None:
    """Perplexities of models that a method has destroyed are orders of magnitude above those of the others."""
    low, high = limits
    if metric.key == "perplexity" and 0 < 20 * low < high:
        axis.axes.set(**{f"{axis.axis_name}scale": "log"})
        axis.set_major_locator(LogLocator(subs=(1, 3) if high < 1000 * low else (1,), numticks=4))
        axis.set_major_formatter(lambda x, _: f"{x:,.0f}" if x < 1e5 else f"1e{math.log10(x):.0f}")
        axis.set_minor_locator(NullLocator())


def _columns(path: dict[int, Point], with_step: bool = False) -> tuple[list[float], ...]:
    rows = [(step, *point) if with_step else point for step, point in sorted(path.items())]
    return tuple(list(column) for column in zip(*rows, strict=True))


def _height(groups: Sequence[Group]) -> float:
    return max(_HEIGHT, sum(heights([group.label for group in groups])) + 60)
