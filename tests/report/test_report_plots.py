"""What is drawn: values, labels that do not lie upon one another, groups told apart without colour."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.colors import to_rgb
from run_folders import TDEC_LOG, TOFU_LOG, make_run, tdec_results

from loku.report import Run
from loku.report.bars import before_and_after
from loku.report.curves import against, over_steps
from loku.report.grouping import group_runs
from loku.report.labels import spread
from loku.report.metrics import metric
from loku.report.style import COLOURS, INK, colour, line, marker, style

_METHODS = ("loku", "ihl", "gd", "gd+fila", "ga", "kl", "npo", "simnpo", "dpo")


@pytest.fixture
def groups(tmp_path):
    """Nine methods whose curves all but coincide, the worst case for labels."""
    runs = []
    for i, method in enumerate(_METHODS):
        log = [
            {**row, "eval_model_utility": 0.5 - i / 1e3, "eval_forget_quality": 10.0 ** -(i + 1)} for row in TDEC_LOG
        ]
        results = tdec_results(0.05 + i / 1e4, 31.0)
        runs.append(make_run(tmp_path / method, method=method, log=log, results=results))
    return group_runs(map(Run.load, runs))


def _disjoint(boxes):
    return not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))


def _texts(figure):
    """Boxes of everything written, in points."""
    figure.draw_without_rendering()
    (axes,) = figure.axes
    ticks = [*axes.get_xticklabels(), *axes.get_yticklabels()] if axes.xaxis.get_visible() else axes.get_yticklabels()
    low, high = sorted(axes.get_xlim()), sorted(axes.get_ylim())
    inside = [t for t in ticks if low[0] <= t.get_position()[0] <= low[1] and high[0] <= t.get_position()[1] <= high[1]]
    written = [*figure.texts, *axes.texts, axes.xaxis.label, *inside]
    return [text.get_window_extent() for text in written if text.get_text() and text.get_visible()]


@pytest.mark.parametrize(
    "draw",
    [
        lambda groups: over_steps(groups, metric("el_10")),
        lambda groups: over_steps(groups, metric("perplexity")),
        lambda groups: against(groups, metric("perplexity"), metric("el_10")),
        lambda groups: against(groups, metric("model_utility"), metric("log10_forget_quality")),
        lambda groups: before_and_after(groups, metric("el_10")),
    ],
)
@pytest.mark.parametrize("count", [1, 3, 9])
def test_no_text_lies_upon_another_or_leaves_the_plot(groups, draw, count):
    with style():
        figure = draw(groups[:count])
        boxes = _texts(figure)
    assert len(boxes) > count and _disjoint(boxes)
    page = figure.bbox
    assert all(b.x0 >= -1 and b.x1 <= page.width + 1 and b.y0 >= -1 and b.y1 <= page.height + 1 for b in boxes)


def test_curves_are_the_means_over_seeds_at_common_steps(tmp_path):
    logs = [TDEC_LOG, [{**row, "eval_ma": 0.4} if "eval_ma" in row else row for row in TDEC_LOG[:3]]]
    runs = [make_run(tmp_path / str(seed), seed=seed, log=log) for seed, log in enumerate(logs)]
    with style():
        (axes,) = over_steps(group_runs(map(Run.load, runs)), metric("ma")).axes
    first, second, mean = (drawn.get_xydata().tolist() for drawn in axes.lines)
    assert first == [[0, 0.95], [2, 0.5], [4, 0.3]] and second == [[0, 0.4], [2, 0.4]]
    assert mean == [[0, pytest.approx(0.675)], [2, pytest.approx(0.45)]]


def test_quality_against_utility_is_drawn_in_log10_with_the_level_of_significance(tmp_path):
    groups = group_runs([Run.load(make_run(tmp_path / "run", log=TOFU_LOG))])
    with style():
        (axes,) = against(groups, metric("model_utility"), metric("log10_forget_quality")).axes
    path, level = axes.lines
    assert path.get_xydata().ravel().tolist() == pytest.approx([0.5, -16, 0.48, -4, 0.47, -2])
    assert level.get_ydata()[0] == pytest.approx(math.log10(0.05))


def test_thresholds_are_drawn(groups):
    with style():
        figure = over_steps(groups[:2], metric("el_10"))
    assert 0.06 in [drawn.get_ydata()[0] for drawn in figure.axes[0].lines]
    assert "forgotten at 0.060" in figure.get_suptitle()


def test_bars_are_before_and_after(tmp_path):
    runs = [make_run(tmp_path / str(s), seed=s, results=tdec_results(el, 31.0)) for s, el in enumerate((0.2, 0.4))]
    with style():
        (axes,) = before_and_after(group_runs(map(Run.load, runs)), metric("el_10")).axes
    assert [bar.get_width() for bar in axes.patches] == pytest.approx([0.9, 0.3])
    assert [text.get_text() for text in axes.texts] == ["0.900 before", "0.300 ± 0.141 after"]


def test_a_destroyed_model_makes_the_perplexity_logarithmic(tmp_path):
    log = [*TDEC_LOG, {"step": 6, "eval_el_10": 0.0, "eval_perplexity": 3e9}]
    groups = group_runs([Run.load(make_run(tmp_path / "run", log=log))])
    with style():
        up, across = over_steps(groups, metric("perplexity")), against(groups, metric("perplexity"), metric("el_10"))
        assert _disjoint(_texts(up)) and _disjoint(_texts(across))
    assert up.axes[0].get_yscale() == "log" and across.axes[0].get_xscale() == "log"
    assert across.axes[0].get_yscale() == "linear"


def test_twenty_groups_differ_in_colour_mark_or_line():
    looks = {(colour(i), marker(i), line(i)) for i in range(20)}
    assert len(looks) == 20
    assert all((marker(i), line(i)) != (marker(i + 8), line(i + 8)) for i in range(8))  # where colours repeat


@pytest.mark.parametrize("shade", [*COLOURS, INK])
def test_colours_of_text_can_be_read_on_white(shade):
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(shade)]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    assert 1.05 / (luminance + 0.05) >= 3.5  # WCAG asks 3 of graphics


@given(st.lists(st.tuples(st.floats(-50, 250), st.floats(1, 20)), min_size=1, max_size=10))
def test_spread_keeps_intervals_apart_in_order_and_inside(items):
    wanted, sizes = map(list, zip(*items, strict=True))
    middles = spread(wanted, sizes, 0, 200)
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    for a, b in itertools.pairwise(order):
        assert middles[b] - middles[a] >= (sizes[a] + sizes[b]) / 2 - 1e-9
    assert all(m - s / 2 >= -1e-9 and m + s / 2 <= 200 + 1e-9 for m, s in zip(middles, sizes, strict=True))


def test_spread_leaves_alone_what_has_room():
    assert spread([10, 100, 50], [10, 10, 10], 0, 200) == [10, 100, 50]
