"""The figures of `tofu_full`, from its results.json."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from loku.report.style import FAINT, colour, marker, style


def draw(results: dict[str, Any], output: Path) -> None:
    """Utility against forget quality, and both by epoch, as PNG files in ``output``."""
    forgets, methods = (list(dict.fromkeys(run[key] for run in results["runs"])) for key in ("forget", "method"))
    with style():
        for name, figure in {
            "tofu-full": _against(results, sorted(forgets), methods),
            "tofu-full-epochs": _over_epochs(results, sorted(forgets), methods),
        }.items():
            figure.savefig(output / f"{name}.png", dpi=200)


def _against(results: dict[str, Any], forgets: Sequence[str], methods: Sequence[str]) -> Figure:
    """A panel a forget set: each run's way over the epochs, its end the larger the higher the rank."""
    figure = Figure(figsize=(2.6 * len(forgets) + 1.2, 3), layout="constrained")
    for axes, forget in zip(figure.subplots(1, len(forgets), squeeze=False)[0], forgets, strict=True):
        for run in (run for run in results["runs"] if run["forget"] == forget and run["epochs"]):
            points = _points(results, run)
            i = methods.index(run["method"])
            axes.plot(*zip(*points, strict=True), color=colour(i), linewidth=0.7, alpha=0.6)
            size = 12 * math.log2(2 * run["rank"])
            axes.scatter(*points[-1], s=size, marker=marker(i), color=colour(i), alpha=0.8, linewidths=0, zorder=3)
        for name, shape in (("target", "+"), ("reference", "*")):
            if place := _whole_point(results, name, forget):
                axes.scatter(*place, s=50, marker=shape, color="black", zorder=4)
        axes.axhline(math.log10(0.05), color=FAINT, linewidth=0.9, linestyle=(0, (4, 2)), zorder=1)
        axes.set(title=forget, xlabel="Model utility")
    figure.axes[0].set_ylabel("log₁₀ forget quality")
    marks = [Line2D([], [], color="black", linestyle="", marker=shape) for shape in "+*"]
    _legend(figure, methods, marks, ["before", "reference"])
    return figure


def _over_epochs(results: dict[str, Any], forgets: Sequence[str], methods: Sequence[str]) -> Figure:
    """Utility and forget quality by epoch: thin lines are ranks, thick ones their mean."""
    figure = Figure(figsize=(2.6 * len(forgets) + 1.2, 4.8), layout="constrained")
    grid = figure.subplots(2, len(forgets), squeeze=False, sharex=True)
    for row, title in enumerate(("Model utility", "log₁₀ forget quality")):
        for axes, forget in zip(grid[row], forgets, strict=True):
            for i, method in enumerate(methods):
                runs = [r for r in results["runs"] if (r["forget"], r["method"]) == (forget, method)]
                _lines(axes, [[point[row] for point in _points(results, run)] for run in runs if run["epochs"]], i)
            axes.set_title(forget if row == 0 else "")
        grid[row][0].set_ylabel(title)
    for axes in grid[1]:
        axes.axhline(math.log10(0.05), color=FAINT, linewidth=0.9, linestyle=(0, (4, 2)), zorder=1)
        axes.set_xlabel("Epoch")
    _legend(figure, methods)
    return figure


def _lines(axes: Axes, paths: Sequence[Sequence[float]], i: int) -> None:
    for path in paths:
        axes.plot(path, color=colour(i), linewidth=0.5, alpha=0.5)
    if paths:
        mean = [statistics.fmean(values) for values in zip(*paths, strict=False)]  # as far as all have come
        axes.plot(mean, color=colour(i), marker=marker(i))


def _legend(figure: Figure, methods: Sequence[str], marks: Sequence[Line2D] = (), names: Sequence[str] = ()) -> None:
    handles = [Line2D([], [], color=colour(i), marker=marker(i)) for i in range(len(methods))]
    figure.legend([*handles, *marks], [*methods, *names], loc="outside right upper", frameon=False)


def _points(results: dict[str, Any], run: dict[str, Any]) -> list[tuple[float, float]]:
    """(utility, log10 forget quality) before, and after each epoch."""
    before = _whole_point(results, "target", run["forget"])
    return [*([before] if before else []), *map(point, run["epochs"])]


def _whole_point(results: dict[str, Any], name: str, forget: str) -> tuple[float, float] | None:
    return point(results[name][forget]) if forget in results[name] else None


def point(metrics: dict[str, Any]) -> tuple[float, float]:
    """(utility, log10 forget quality)."""
    return metrics["model_utility"], math.log10(max(metrics["forget_quality"], 1e-300))
