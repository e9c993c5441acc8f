"""Reading run folders: what is measured where, resumed and killed runs, and what is refused."""

from __future__ import annotations

import math

import pytest
from run_folders import TDEC_LOG, TOFU_LOG, make_run, tdec_results

from loku.report import Run


def test_before_and_after_come_from_the_results(tmp_path):
    run = Run.load(make_run(tmp_path / "run", results=tdec_results(0.01, 32.5)))
    assert run.finished
    assert run.before == {"el_10": 0.9, "ma": 0.95, "perplexity": 30.0}
    assert run.after == {"el_10": 0.01, "ma": 0.3, "perplexity": 32.5}
    assert run.thresholds == {"el_10": 0.06, "ma": 0.31}
    assert run.costs == {"seconds": 10.0, "peak_memory_mib": 1500.0}


def test_a_killed_run_has_what_it_logged(tmp_path):
    run = Run.load(make_run(tmp_path / "run"))
    assert not run.finished and run.costs == {}
    assert run.before == {"el_10": 0.9, "ma": 0.95, "perplexity": 30.0}
    assert run.after == {"el_10": 0.05, "ma": 0.3, "perplexity": 33.0}
    assert list(run.evaluations) == [0, 2, 4]  # step 1 logged a loss only


def test_a_run_killed_before_its_second_evaluation_has_no_after(tmp_path):
    run = Run.load(make_run(tmp_path / "run", log=TDEC_LOG[:2]))
    assert run.before["el_10"] == 0.9 and run.after == {}


def test_after_a_run_that_diverged_there_is_nothing(tmp_path):
    """Rather than what was measured while all was well."""
    lost = {"eval_el_10": None, "eval_ma": 0.1, "eval_perplexity": None}
    run = Run.load(make_run(tmp_path / "half", log=[*TDEC_LOG, {"step": 6, **lost}]))
    assert run.after == {"ma": 0.1} and run.not_finite == ["el_10", "perplexity"]
    run = Run.load(make_run(tmp_path / "run", log=[*TDEC_LOG, {"step": 6, **lost, "eval_ma": None}]))
    assert run.after == {} and run.not_finite == ["el_10", "ma", "perplexity"]
    assert Run.load(make_run(tmp_path / "well")).not_finite == []
    assert Run.load(make_run(tmp_path / "unmeasured", log=TDEC_LOG[1:2])).not_finite == []


def test_truncated_last_line_is_skipped_with_a_warning(tmp_path):
    folder = make_run(tmp_path / "run")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "eval_el_')
    with pytest.warns(UserWarning, match=r"metrics.jsonl, line 5 is truncated"):
        run = Run.load(folder)
    assert run.after["el_10"] == 0.05


def test_truncation_inside_a_character(tmp_path):
    folder = make_run(tmp_path / "run")
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write('{"step": 6, "note": "é'.encode()[:-1])
    with pytest.warns(UserWarning, match="truncated"):
        assert list(Run.load(folder).evaluations) == [0, 2, 4]


def test_a_resumed_run_forgets_what_the_killed_one_had_logged_beyond(tmp_path):
    log = [*TDEC_LOG, {"step": 2, "loss": 0.5}, {"step": 3, "eval_el_10": 0.1}]
    run = Run.load(make_run(tmp_path / "run", log=log))
    assert list(run.evaluations) == [0, 2, 3]
    assert run.evaluations[2]["el_10"] == 0.2  # logged before the kill, at the step that was resumed from
    assert run.after == {"el_10": 0.1}


def test_the_loss_and_the_evaluation_of_a_step_are_merged_and_timings_are_no_metrics(tmp_path):
    log = [{"step": 0, "loss": 2.0}, {"step": 0, "eval_ma": 0.4, "eval_runtime": 3.0, "eval_samples_per_second": 9.0}]
    run = Run.load(make_run(tmp_path / "run", log=log))
    assert run.metrics == [log[0] | log[1]]
    assert run.evaluations == {0: {"ma": 0.4}}


def test_forget_quality_has_a_logarithm(tmp_path):
    run = Run.load(make_run(tmp_path / "run", log=TOFU_LOG))
    assert run.before["log10_forget_quality"] == pytest.approx(-16)
    none = Run.load(make_run(tmp_path / "none", log=[{"step": 1, "eval_forget_quality": 0.0}]))
    assert none.after["log10_forget_quality"] == -math.inf


def test_values_that_are_no_numbers_are_missing(tmp_path):
    results = {"before": {"el_10": None, "ma": 0.5}, "after": {"ma": True, "perplexity": math.inf}}
    run = Run.load(make_run(tmp_path / "run", results=results))
    assert run.before == {"ma": 0.5} and run.after == {"perplexity": math.inf}


def test_versions_and_the_log_may_be_missing(tmp_path):
    folder = make_run(tmp_path / "run", results=tdec_results(0.01, 31.0))
    (folder / "versions.json").unlink()
    (folder / "metrics.jsonl").unlink()
    run = Run.load(folder)
    assert run.versions == {} and run.evaluations == {} and run.after["el_10"] == 0.01


@pytest.mark.parametrize(
    ("name", "text", "error"),
    [
        ("metrics.jsonl", '{"file": "model.safetensors"}\n', r"must be the folder of a training or of an evaluation"),
        ("config.yaml", "method: [", r"config.yaml is not valid YAML"),
        ("config.yaml", "- loku", r"config.yaml must hold a mapping, but holds a list"),
        ("versions.json", "{", r"versions.json is not valid JSON"),
        ("results.json", "[1]", r"results.json must hold a mapping, but holds a list"),
        ("results.json", '{"after": 0.5}', r"results.json: 'after' must map metrics to numbers, but is 0.5"),
        ("metrics.jsonl", '{"step": 1}\n{"st\n{"step": 2}\n', r"metrics.jsonl, line 2 is not valid JSON"),
        ("metrics.jsonl", '{"step": 1}\n7\n', r"metrics.jsonl, line 2 must hold a mapping, but holds a int"),
        ("metrics.jsonl", '{"step": 1}\n{"loss": 1}\n', r"every line must have an integer 'step', but one has None"),
    ],
)
def test_corrupt_files_are_named(tmp_path, name, text, error):
    folder = make_run(tmp_path / "run")
    (folder / name).write_text(text)
    with pytest.raises(ValueError, match=error):
        Run.load(folder)


def test_an_evaluation_has_its_results_and_no_steps(tmp_path):
    lines = [{"name": "text", "value": 12.5}]
    run = Run.load(make_run(tmp_path / "run", log=lines, results={"after": {"text perplexity": 12.5}}))
    assert run.after == {"text perplexity": 12.5} and run.before == run.evaluations == {} and run.metrics == []


def test_what_is_no_run_folder_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent does not exist"):
        Run.load(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match=r"has no config\.yaml"):
        Run.load(tmp_path)
    folder = make_run(tmp_path / "run")
    (folder / "metrics.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match=r"neither metrics\.jsonl nor results\.json"):
        Run.load(folder)
