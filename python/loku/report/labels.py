"""Labels beside a plot, at the height of what they name, none upon another."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import NamedTuple

from matplotlib.axes import Axes

_WRAP = 14  # characters
_LINE = 10.5  # points from one line of text to the next
_GAP = 14.0  # points between the axes and a label


class End(NamedTuple):
    """A point of the data, and what to write beside the axes for it."""

    x: float
    y: float
    text: str
    colour: str


def wrap(text: str) -> str:
    return "\n".join(textwrap.wrap(text, _WRAP, max_lines=3, placeholder="…"))


def heights(texts: Sequence[str]) -> list[float]:
    """Points that each label takes, wrapped."""
    return [_LINE * (wrap(text).count("\n") + 1) + 2 for text in texts]


def spread(wanted: Sequence[float], sizes: Sequence[float], low: float, high: float) -> list[float]:
    """Middles of intervals of ``sizes`` close to ``wanted``, in that order, that do not overlap and lie in
    [low, high] (from ``low`` upwards if they do not fit)."""
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    middles = list(wanted)
    ceiling = high
    for i in reversed(order):  # down from above, so that the last loop only has to push up from below
        middles[i] = min(wanted[i], ceiling - sizes[i] / 2)
        ceiling = middles[i] - sizes[i] / 2
    floor = low
    for i in order:
        middles[i] = max(middles[i], floor + sizes[i] / 2)
        floor = middles[i] + sizes[i] / 2
    return middles


def label_ends(axes: Axes, ends: Sequence[End]) -> None:
    """Writes each end's text to the right of the axes, with a thin line to its point. Last, when all is drawn: the
    layout is fixed here."""
    figure = axes.figure
    texts = [figure.text(0, 0, wrap(end.text), color=end.colour, va="center", linespacing=1.1) for end in ends]
    width = max(text.get_window_extent().width for text in texts) + _GAP + 4
    figure.get_layout_engine().set(rect=(0, 0, 1 - width / figure.bbox.width, 1))
    for text in texts:
        text.set_in_layout(False)
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    box = axes.get_window_extent()
    points = [axes.transData.transform((end.x, end.y)) for end in ends]
    wanted = [min(max(y, box.y0), box.y1) for _, y in points]
    middles = spread(wanted, heights([end.text for end in ends]), box.y0 - _LINE / 2, figure.bbox.height)
    for end, text, (x, _), y, middle in zip(ends, texts, points, wanted, middles, strict=True):
        text.set_position(((box.x1 + _GAP) / figure.bbox.width, middle / figure.bbox.height))
        leader = {"arrowstyle": "-", "color": end.colour, "linewidth": 0.7, "linestyle": (0, (1, 1.5))}
        axes.annotate(
            "",
            xy=(min(x, box.x1), y),
            xytext=(box.x1 + _GAP - 2, middle),
            xycoords="figure points",
            textcoords="figure points",
            arrowprops={**leader, "shrinkA": 0, "shrinkB": 2},
            annotation_clip=False,
        )
