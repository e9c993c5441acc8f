"""Horizontal bars, one or two a group, each with its number at its end."""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Annotation

from loku.report.grouping import Group, Statistic
from loku.report.labels import heights, wrap
from loku.report.metrics import ABSENT, Metric, cost_label, show
from loku.report.style import FAINT, INK, colour, figure

_THICK, _SPACE = 12.0, 8.0  # points: of a bar, and between groups


def before_and_after(groups: Sequence[Group], metric: Metric) -> Figure:
    """For each group, the metric of the model that was given (grey) and of the unlearned one."""
    rows = [
        [
            (group.statistics("before").get(metric.key), FAINT, "before"),
            (group.statistics("after").get(metric.key), colour(i), "after"),
        ]
        for i, group in enumerate(groups)
    ]
    return _bars(groups, rows, metric.title)


def costs(groups: Sequence[Group], key: str) -> Figure:
    rows = [[(group.statistics("costs").get(key), colour(i), "")] for i, group in enumerate(groups)]
    return _bars(groups, rows, cost_label(key))


Bar = tuple[Statistic | None, str, str]  # how long, colour, and a word to add to the number


def _bars(groups: Sequence[Group], rows: Sequence[Sequence[Bar]], title: str) -> Figure:
    shown = [(group.label, row) for group, row in zip(groups, rows, strict=True) if any(bar[0] for bar in row)]
    names = [name for name, _ in shown]
    sizes = [max(_THICK * len(row), height) + _SPACE for (_, row), height in zip(shown, heights(names), strict=True)]
    made, axes = figure(sum(sizes) + 30, title)
    top, middles, numbers = 0.0, [], []
    for (_, row), size in zip(shown, sizes, strict=True):
        middles.append(top + size / 2)
        for k, bar in enumerate(row):
            numbers.append(_bar(axes, middles[-1] + _THICK * (k - (len(row) - 1) / 2), bar))
        top += size
    axes.set_ylim(top, 0)
    axes.set_yticks(middles, [wrap(name) for name in names])
    axes.tick_params(axis="y", length=0)
    axes.xaxis.set_visible(False)  # the numbers are at the bars
    axes.grid(visible=False)
    axes.spines["bottom"].set_visible(False)
    _leave_room(axes, numbers)
    return made


def _bar(axes: Axes, y: float, bar: Bar) -> Annotation:
    statistic, fill, word = bar
    length, spread, number = 0.0, 0.0, ABSENT
    if statistic is not None:
        length = statistic.mean if math.isfinite(statistic.mean) else 0.0
        spread = statistic.std if statistic.std is not None and math.isfinite(statistic.std) else 0.0
        number = show(statistic.mean, statistic.std)
    axes.barh(y, length, height=_THICK - 2, color=fill, linewidth=0)
    if spread:
        axes.errorbar(length, y, xerr=spread, color=INK, elinewidth=0.8, capsize=2, fmt="none")
    end, beside = (length + spread, y), {"xytext": (4, 0), "textcoords": "offset points"}
    return axes.annotate(f"{number} {word}".strip(), end, **beside, va="center", size=8, in_layout=False)


def _leave_room(axes: Axes, numbers: Sequence[Annotation]) -> None:
    """Lets the x axis go as far as the longest bar with the widest number at its end needs."""
    axes.figure.draw_without_rendering()
    available, taken = axes.bbox.width, max(number.get_window_extent().width for number in numbers) + 8
    axes.set_xlim(0, max(axes.dataLim.x1, 1e-9) * available / max(available - taken, 0.1 * available))
