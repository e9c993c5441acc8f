"""Aggregates of logs: the published numbers, and each definition spelt out."""

from __future__ import annotations

import copy
import json
import math

import numpy as np
import pytest
from scipy.stats import ks_2samp

from loku.evaluation import aggregate_tofu, read_log, write_log
from loku.evaluation.tofu_log import TASKS

PARTS = ["retain", "real_authors", "world_facts"]
NINE = [f"{part}_{measure}" for part in PARTS for measure in ("probability", "rouge", "truth_ratio")]


def some_log(samples: int = 7, seed: int = 0) -> dict:
    """Losses and recalls at random, with truth ratios on both sides of 1."""
    rng = np.random.default_rng(seed)
    log = {}
    for part, task in TASKS.items():
        false = 3 if part in ("real_authors", "world_facts") else 5
        log[task] = {
            "avg_gt_loss": rng.gamma(2, 1, samples),
            "avg_paraphrased_loss": rng.gamma(3, 1, samples),
            "average_perturb_loss": rng.gamma(4, 1, (samples, false)),
            "rougeL_recall": rng.random(samples),
        }
        log[task] = {name: {str(i): x for i, x in enumerate(v.tolist())} for name, v in log[task].items()}
    return log


@pytest.fixture(scope="module")
def published(data_dir):
    return {name: read_log(data_dir / "tofu_eval_logs" / f"{name}.json") for name in ("phi_full", "phi_retain90")}


def test_published_logs_give_the_published_numbers(published):
    full, retain = (aggregate_tofu(log, published["phi_retain90"]) for log in published.values())
    assert f"{full['model_utility']:.5f}" == "0.50335"
    assert f"{retain['model_utility']:.5f}" == "0.51300"
    assert f"{full['forget_quality']:.3e}" == "2.194e-16"
    assert f"{full['ks_statistic']:.5f}" == "0.34667"
    assert retain["forget_quality"] == 1.0 and retain["ks_statistic"] == 0.0
    assert set(NINE) < set(full)


def test_only_the_truth_ratio_tells_the_definitions_apart(published):
    tofu, other = (
        aggregate_tofu(published["phi_full"], published["phi_retain90"], d) for d in ("tofu", "open-unlearning")
    )
    for name, value in tofu.items():
        if name.endswith(("truth_ratio", "utility")):
            assert abs(other[name] - value) > 1e-3
        else:
            assert other[name] == pytest.approx(value, rel=1e-8)


@pytest.mark.parametrize("definition", ["tofu", "open-unlearning"])
def test_each_definition_spelt_out(definition):
    log, retain_log = some_log(seed=0), some_log(seed=1)
    eps = 1e-10 if definition == "open-unlearning" else 0.0
    ratio_for_test = {}
    expected = {}
    for part, task in TASKS.items():
        answers, closeness, truths = [], [], []
        for sample in log[task]["avg_gt_loss"]:
            answer = math.exp(-log[task]["avg_gt_loss"][sample])
            true = math.exp(-log[task]["avg_paraphrased_loss"][sample])
            losses = log[task]["average_perturb_loss"][sample]
            if part in ("real_authors", "world_facts"):
                answer /= answer + sum(math.exp(-loss) for loss in losses) + eps
            arithmetic, geometric = np.mean(np.exp(-np.array(losses))), math.exp(-np.mean(losses))
            ratio = (arithmetic if definition == "tofu" else geometric) / (true + eps)
            answers.append(answer)
            truths.append(max(0, 1 - ratio))
            closeness.append(min(ratio, 1 / (ratio + eps)))
        expected[f"{part}_probability"] = np.mean(answers)
        expected[f"{part}_truth_ratio"] = np.mean(closeness if part == "forget" else truths)
        expected[f"{part}_rouge"] = np.mean(list(log[task]["rougeL_recall"].values()))
    for name, of in (("model", log), ("retain", retain_log)):
        task = of[TASKS["forget"]]
        false = np.array(list(task["average_perturb_loss"].values())).mean(1)
        ratio_for_test[name] = np.exp(false - np.array(list(task["avg_paraphrased_loss"].values())))
    test = ks_2samp(ratio_for_test["model"], ratio_for_test["retain"])
    expected |= {"forget_quality": test.pvalue, "ks_statistic": test.statistic}
    expected["model_utility"] = 9 / sum(1 / expected[name] for name in NINE)
    assert aggregate_tofu(log, retain_log, definition) == pytest.approx(expected, rel=1e-12)


def test_without_a_retain_log_or_a_task():
    log = some_log()
    assert aggregate_tofu(log)["forget_quality"] is None
    assert aggregate_tofu(log)["model_utility"] > 0
    forget_only = {TASKS["forget"]: log[TASKS["forget"]]}
    result = aggregate_tofu(forget_only, log)
    assert result["model_utility"] is None and result["forget_quality"] == 1.0
    del log[TASKS["forget"]]
    assert aggregate_tofu(log, some_log())["forget_quality"] is None


@pytest.mark.parametrize("definition", ["tofu", "open-unlearning"])
def test_a_model_that_lost_everything(definition):
    """Losses whose probabilities are 0 in float64: measures stay finite, and so does the order that the test needs."""
    log = some_log(samples=40)
    for task in log.values():
        for metric in ("avg_gt_loss", "avg_paraphrased_loss"):
            task[metric] = {sample: 1e4 + value for sample, value in task[metric].items()}
        task["average_perturb_loss"] = {s: [1e4 + x for x in v] for s, v in task["average_perturb_loss"].items()}
    with np.errstate(over="raise", invalid="raise", divide="raise"):
        result = aggregate_tofu(log, some_log(samples=40), definition)
    assert all(math.isfinite(value) for value in result.values())
    assert result["model_utility"] == 0
    if definition == "tofu":  # the ratios are those of the log without the shift
        assert result["forget_quality"] == pytest.approx(1.0)


def test_samples_are_matched_by_index_not_by_order():
    log = some_log()
    shuffled = copy.deepcopy(log)
    for task in shuffled.values():
        task["avg_paraphrased_loss"] = dict(reversed(task["avg_paraphrased_loss"].items()))
    assert aggregate_tofu(shuffled, log) == aggregate_tofu(log, log)


def with_texts(log: dict, prompt: str, answers: list[str]) -> dict:
    texts = {str(i): [f"{prompt}Who?", "They say so.", answer] for i, answer in enumerate(answers)}
    return {**log, TASKS["forget"]: {**log[TASKS["forget"]], "generated_text": texts}}


def test_a_retain_log_of_another_forget_set_is_refused():
    """It may have as many samples; of other models' templates the questions may differ, but never the true answers."""
    answers = [f"Answer {i}." for i in range(7)]
    log, others = with_texts(some_log(), "Question: ", answers), [*answers[:3], "Another.", *answers[4:]]
    with pytest.raises(ValueError, match=r"retain_log .* sample 3 has the true answer 'Answer 3.', got 'Another.'"):
        aggregate_tofu(log, with_texts(some_log(), "Question: ", others))
    assert aggregate_tofu(log, with_texts(some_log(), "[INST] ", answers))["forget_quality"] == 1.0
    assert aggregate_tofu(log, some_log())["forget_quality"] == 1.0  # without texts there is nothing to compare


def test_logs_are_written_as_they_are_read(tmp_path, published):
    write_log(published["phi_full"], tmp_path / "folder" / "log.json")
    assert read_log(tmp_path / "folder" / "log.json") == published["phi_full"]
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["log.json"]


def test_a_log_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "log.json"
    write_log(some_log(), path)
    log = some_log(seed=1)
    log[TASKS["retain"]]["generated_text"] = {"0": object()}  # fails while it is written
    with pytest.raises(TypeError):
        write_log(log, path)
    assert read_log(path) == some_log()
    assert list(tmp_path.iterdir()) == [path]


def test_bad_logs_are_refused(tmp_path):
    path = tmp_path / "log.json"
    with pytest.raises(ValueError, match=r"definition must be one of tofu, open-unlearning, got 'mean'"):
        aggregate_tofu(some_log(), definition="mean")
    with pytest.raises(ValueError, match=r"has none of them"):
        aggregate_tofu({"some_task.json": {}})
    with pytest.raises(ValueError, match=r"forget samples of log, which has 7, got 6"):
        aggregate_tofu(some_log(7), some_log(6))
    path.write_text('{"eval_log.json": ')
    with pytest.raises(ValueError, match=r"log\.json is not a JSON file"):
        read_log(path)
    for metric, value, message in (
        ("rougeL_recall", [0.5], r"eval_log_forget\.json, rougeL_recall must map samples to values, got list"),
        ("avg_gt_loss", {"0": None}, r"eval_log_forget\.json, avg_gt_loss, sample 0 must be a number, got None"),
        ("average_perturb_loss", {"0": 1.0}, r"average_perturb_loss, sample 0 must be a list of numbers, got 1\.0"),
    ):
        log = some_log(1)
        log[TASKS["forget"]][metric] = value
        with pytest.raises(ValueError, match=message):
            aggregate_tofu(log)
    with pytest.raises(ValueError, match=r"eval_log_forget\.json must map metrics to their samples, got list"):
        aggregate_tofu({TASKS["forget"]: []})
    log = some_log()
    del log[TASKS["forget"]]["rougeL_recall"]["3"]
    path.write_text(json.dumps(log))
    with pytest.raises(ValueError, match=r"log\.json: eval_log_forget\.json lacks rougeL_recall, or has it for other"):
        read_log(path)
