"""The figures of `tofu_full`, from its results.json."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, NullLocator

from loku.report.style import FAINT, colour, marker, style

_ORDER = ("loku", "ihl", "gd", "gd+fila")  # their colours in the figures of the other experiments; then the rest
_WHOLE = {"target": ("before", "+"), "reference": ("reference", "*")}  # models: what they are called, and their marks
_PASSED = math.log10(0.05)
_TICKS = (0, -1, -2, -5, -10, -20, -50, -100, -200)
_LINEAR = 2  # log10 of p is drawn as it is down to minus this, and by its own logarithm below
_DASHES = (0, (4, 2))


def draw(results: dict[str, Any], output: Path) -> None:
    """Utility against forget quality, and both by epoch, as PNG files in ``output``."""
    forgets, ranks, found = (sorted({run[key] for run in results["runs"]}) for key in ("forget", "rank", "method"))
    results = {**results, "runs": [run for run in results["runs"] if run["epochs"]]}
    methods = [*(method for method in _ORDER if method in found), *(method for method in found if method not in _ORDER)]
    with style():
        for name, figure in {
            "tofu-full": _against(results, forgets, ranks, methods),
            "tofu-full-epochs": _over_epochs(results, forgets, ranks, methods),
        }.items():
            figure.savefig(output / f"{name}.png", dpi=120)


def _against(results: dict[str, Any], forgets: Sequence[str], ranks: Sequence[int], methods: Sequence[str]) -> Figure:
    """A panel a forget set: where each run ended, the mark the larger the higher the rank, a line from rank to rank."""
    figure = Figure(figsize=(2.8 * len(forgets) + 1.2, 3.8), layout="constrained")
    for axes, forget in zip(figure.subplots(1, len(forgets), squeeze=False, sharey=True)[0], forgets, strict=True):
        for i, method in enumerate(methods):
            runs = [run for run in results["runs"] if (run["forget"], run["method"]) == (forget, method)]
            ends = {run["rank"]: point(run["epochs"][-1]) for run in sorted(runs, key=lambda run: run["rank"])}
            columns = list(zip(*ends.values(), strict=True)) or [(), ()]
            axes.plot(*columns, color=colour(i), linewidth=0.8, alpha=0.6)
            sizes = [_size(rank) ** 2 for rank in ends]
            axes.scatter(*columns, s=sizes, marker=marker(i), color=colour(i), alpha=0.75, linewidths=0)
        for name, (_, shape) in _WHOLE.items():
            if forget in results[name]:
                axes.scatter(*point(results[name][forget]), s=50, marker=shape, color="black", zorder=4)
        axes.set(title=forget, xlabel="Model utility", xlim=(-0.04, 0.94))
    _scale_qualities(figure.axes)
    figure.axes[0].set_ylabel("log₁₀ forget quality")
    black = {"color": "black", "linestyle": "", "markersize": 7}
    marks = {label: Line2D([], [], marker=shape, **black) for label, shape in _WHOLE.values()}
    sizes = {f"rank {r}": Line2D([], [], color=FAINT, linestyle="", marker="o", markersize=_size(r)) for r in ranks}
    _legend(figure, methods, marks | sizes)
    return figure


def _over_epochs(
    results: dict[str, Any], forgets: Sequence[str], ranks: Sequence[int], methods: Sequence[str]
) -> Figure:
    """A column a rank, and of each forget set a row of utility and one of forget quality, by epoch."""
    rows = [(forget, k) for forget in forgets for k in (0, 1)]
    figure = Figure(figsize=(2 * len(ranks) + 1.6, 1.55 * len(rows) + 0.3), layout="constrained")
    grid = figure.subplots(len(rows), len(ranks), squeeze=False, sharex=True, sharey="row")
    for (forget, k), line in zip(rows, grid, strict=True):
        for rank, axes in zip(ranks, line, strict=True):
            for run in (run for run in results["runs"] if (run["forget"], run["rank"]) == (forget, rank)):
                before = {0: results["target"][forget]} if forget in results["target"] else {}
                path = before | {metrics["epoch"]: metrics for metrics in run["epochs"]}
                i = methods.index(run["method"])
                values = [point(metrics)[k] for metrics in path.values()]
                axes.plot(list(path), values, color=colour(i), marker=marker(i), linewidth=1.3)
        if k == 0:
            line[0].set_ylim(-0.05, 1)
        else:
            _scale_qualities(line)
        line[0].set_ylabel(f"{forget}\n{('model utility', 'log₁₀ quality')[k]}")
    for rank, top, bottom in zip(ranks, grid[0], grid[-1], strict=True):
        top.set_title(f"rank {rank}")
        bottom.set_xlabel("Epoch")
    _legend(figure, methods, {})
    return figure


def _scale_qualities(row: Sequence[Axes]) -> None:
    """Of a row of panels in which all is drawn: room for what is near 0.05, beside methods that ruin a model."""
    for axes in row:
        axes.axhline(_PASSED, color=FAINT, linewidth=0.9, linestyle=_DASHES, zorder=1)
        axes.set_yscale("symlog", linthresh=_LINEAR, linscale=1.5)
        axes.yaxis.set(major_locator=FixedLocator(_TICKS), minor_locator=NullLocator(), major_formatter="{x:.0f}")
    row[0].set_ylim(1.5 * min(axes.dataLim.y0 for axes in row), 0.25)


def _size(rank: int) -> float:
    """Of a mark, in points."""
    return 2.3 * math.log2(rank)


def _legend(figure: Figure, methods: Sequence[str], others: dict[str, Line2D]) -> None:
    lines = {name: Line2D([], [], color=colour(i), marker=marker(i)) for i, name in enumerate(methods)}
    lines |= {"p = 0.05": Line2D([], [], color=FAINT, linewidth=0.9, linestyle=_DASHES)} | others
    figure.legend(lines.values(), lines.keys(), loc="outside right upper", frameon=False)


def point(metrics: dict[str, Any]) -> tuple[float, float]:
    """(utility, log10 forget quality)."""
    return metrics["model_utility"], math.log10(max(metrics["forget_quality"], 1e-300))
