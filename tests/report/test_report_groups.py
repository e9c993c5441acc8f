"""Which runs are one group, what groups are called, their statistics, and how numbers are written."""

from __future__ import annotations

import math
import statistics

import pytest
from run_folders import TDEC_LOG, make_run, tdec_results

from loku.report import Run
from loku.report.grouping import common_settings, differing_settings, group_runs, mean_path
from loku.report.metrics import cost_label, metric, ordered, show


def _groups(tmp_path, *configs):
    runs = [Run.load(make_run(tmp_path / str(i), **config)) for i, config in enumerate(configs)]
    return group_runs(runs)


def test_runs_that_differ_in_the_seed_only_are_one_group(tmp_path):
    resumed = {"resume": True, "save_strategy": "epoch", "rank": 16.0}
    groups = _groups(tmp_path, {"seed": 0}, {"seed": 1, "method": "gd"}, {"seed": 1}, {"seed": 2, **resumed})
    assert [(group.label, group.seeds) for group in groups] == [("loku", [0, 1, 2]), ("gd", [1])]


def test_runs_from_different_importance_files_are_not_seeds(tmp_path):
    groups = _groups(tmp_path, {"importance": "a/i.st"}, {"importance": "b/i.st", "seed": 1}, {"importance": "b/i.st"})
    assert [(group.label, group.seeds) for group in groups] == [
        ("loku, importance a/i.st", [0]),
        ("loku, importance b/i.st", [1, 0]),
    ]


def test_mean_and_sample_standard_deviation(tmp_path):
    values = [0.01, 0.02, 0.06]
    runs = [make_run(tmp_path / str(i), seed=i, results=tdec_results(el, 31.0)) for i, el in enumerate(values)]
    (group,) = group_runs(map(Run.load, runs))
    found = group.statistics("after")["el_10"]
    assert found.mean == pytest.approx(0.03) and found.count == 3
    assert found.std == pytest.approx(statistics.stdev(values))  # n - 1
    assert group.statistics("before")["el_10"].std == 0


def test_a_metric_that_some_runs_lack_is_counted(tmp_path):
    groups = _groups(tmp_path, {"seed": 0, "results": tdec_results(0.02, 31.0)}, {"seed": 1, "log": TDEC_LOG[:1]})
    assert groups[0].statistics("after")["el_10"] == (0.02, None, 1)
    assert groups[0].statistics("before")["el_10"].count == 2


def test_infinities_stay_in_the_mean(tmp_path):
    results = [tdec_results(0.0, perplexity) for perplexity in (31.0, math.inf)]
    (group,) = _groups(tmp_path, *({"seed": i, "results": r} for i, r in enumerate(results)))
    found = group.statistics("after")["perplexity"]
    assert found.mean == math.inf and math.isnan(found.std)


@pytest.mark.parametrize(
    ("configs", "labels"),
    [
        ([{}, {"method": "gd"}], ["loku", "gd"]),
        ([{"rank": 4}, {"rank": 8, "method": "gd"}], ["loku, rank 4", "gd, rank 8"]),
        # alpha differs too, but rank says it already
        ([{"rank": 4, "alpha": 8}, {"rank": 8, "alpha": 16}], ["loku, rank 4", "loku, rank 8"]),
        ([{"learning_rate": 0.1}, {"learning_rate": 0.2}, {"method": "gd"}], None),
        ([{"model": "a/small/"}, {"model": "b/large"}], ["loku, model small", "loku, model large"]),
        ([{"model": m} for m in ("a/x/m", "b/x/m", "n")], [f"loku, model {m}" for m in ("a/x/m", "b/x/m", "n")]),
        ([{"model": "r/a/m"}, {"model": "r/b/m/"}, {"model": "m"}], [f"loku, model {m}" for m in ("a/m", "b/m", "m")]),
        ([{"model": "a/m"}, {"model": "a/m/"}], ["loku, model a/m (1)", "loku, model a/m (2)"]),
        ([{"method": None}], ["null"]),
    ],
)
def test_labels_say_how_groups_differ(tmp_path, configs, labels):
    labels = labels or ["loku, learning_rate 0.1", "loku, learning_rate 0.2", "gd"]
    assert [group.label for group in _groups(tmp_path, *configs)] == labels


def test_settings_are_common_or_differ(tmp_path):
    groups = _groups(tmp_path, {"rank": 4}, {"rank": 8, "method": "gd", "beta": 0.1})
    assert differing_settings(groups) == {"rank": ["4", "8"], "beta": ["—", "0.1"]}
    common = common_settings(groups)
    assert common["model"] == "m" and not {"rank", "beta", "method", "seed", "output_dir"} & set(common)


def test_paths_keep_finite_points_that_have_all_metrics(tmp_path):
    log = [*TDEC_LOG, {"step": 6, "eval_el_10": 0.01}, {"step": 8, "eval_el_10": 0.01, "eval_perplexity": math.inf}]
    (group,) = _groups(tmp_path, {"log": log})
    assert group.paths("perplexity", "el_10") == [{0: (30.0, 0.9), 2: (31.0, 0.2), 4: (33.0, 0.05)}]


def test_paths_without_a_log_go_from_before_to_after(tmp_path):
    (group,) = _groups(tmp_path, {"log": [], "results": tdec_results(0.02, 31.0)})
    assert group.paths("perplexity", "el_10") == [{0: (30.0, 0.9), 1: (31.0, 0.02)}]
    assert group.logged("el_10") == []


def test_mean_path_is_over_common_steps():
    assert mean_path([{0: (1.0,), 2: (3.0,), 4: (9.0,)}, {0: (2.0,), 2: (5.0,)}]) == {0: (1.5,), 2: (4.0,)}
    assert mean_path([]) == {}


@pytest.mark.parametrize(
    ("value", "std", "text"),
    [
        (0.1234, None, "0.123"),
        (0.1234, 0.0056, "0.123 ± 0.006"),
        (0.9, 0.0, "0.900"),
        (0.9, 0.0001, "0.900"),
        (1234.5, 0.2, "1,234"),
        (27.405, 0.2, "27.41 ± 0.20"),
        (123.45, None, "123.5"),
        (12345.6, 78.9, "12,346 ± 79"),
        (0.00012, None, "1.2e-04"),
        (-16.25, None, "-16.25"),
        (5.0, 0.0, "5"),
        (math.inf, math.nan, "inf ± nan"),
    ],
)
def test_numbers_to_show(value, std, text):
    assert show(value, std) == text


def test_names_of_metrics():
    assert metric("el_10").title == "EL₁₀ (lower is better)"
    assert metric("log10_forget_quality").title == "log₁₀ forget quality (higher is better)"
    assert (metric("retain_truth_ratio").label, metric("retain_truth_ratio").role) == ("Retain truth ratio", "other")
    assert metric("wiki text:test perplexity").title == "Perplexity of wiki text:test (lower is better)"
    keys = {"perplexity", "el_10", "el_5", "world_facts", "ma", "model_utility", "forget_quality"}
    assert [m.key for m in ordered(keys)] == ["el_5", "el_10", "ma", "model_utility", "perplexity", "world_facts"]


def test_names_of_costs():
    labels = [cost_label(key) for key in ("seconds", "importance_seconds", "peak_memory_mib", "tokens_per_second")]
    assert labels == ["Time (s)", "Importance (s)", "Peak memory (MiB)", "Tokens per second"]
