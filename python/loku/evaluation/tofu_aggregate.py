"""Model utility and forget quality from TOFU's logs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import logsumexp
from scipy.stats import hmean, ks_2samp

from loku.evaluation.tofu_log import TASKS, TofuLog, check_log


def aggregate_tofu(
    log: TofuLog, retain_log: TofuLog | None = None, definition: str = "tofu"
) -> dict[str, float | None]:
    """Model utility, forget quality and what they are made of (TOFU, arXiv 2401.06121, section 2.2).

    With l, l' and l_j a sample's mean nats a token of the answer, of its paraphrase (for authors and facts the answer
    itself) and of the J false answers:

    - probability: mean of exp(-l); for authors and facts mean of exp(-l) / (exp(-l) + sum_j exp(-l_j)).
    - rouge: mean recall of ROUGE-L.
    - truth_ratio: mean of max(0, 1 - R); for the forget set mean of min(R, 1 / R).
    - model_utility: harmonic mean of these nine for retain set, authors and facts.
    - forget_quality: p-value of the two-sample Kolmogorov-Smirnov test of 1 / G, G = exp(-mean_j l_j) / exp(-l'), on
      the forget set, of this model against the one trained without it.

    The definitions differ in the truth ratio and in rounding:

    - "tofu", as the original program computes what it published: R = mean_j exp(-l_j) / exp(-l'), with the arithmetic
      mean of the false answers' probabilities, where the test's G has their geometric mean.
    - "open-unlearning": R = G, the geometric mean throughout, and 1e-10 is added to each denominator: to exp(-l') in
      G, to G in 1 / G, and to the sum in the normalised probability.

    All is computed from logarithms, so that losses of any size are served.

    Args:
        log: of the model, as `evaluate_tofu` or `read_log` gives it.
        retain_log: of the model trained on the retain set alone, with the same forget samples.
        definition: "tofu" or "open-unlearning".

    Returns:
        "model_utility" (None if the log lacks one of its three tasks), "forget_quality" and "ks_statistic" (None
        without a retain_log, or without the forget task), and "<part>_<measure>" for each part of `TASKS` that the log
        has and each of "probability", "rouge" and "truth_ratio".

    Raises:
        ValueError: the definition is unknown, a log lacks a metric, or the two have different forget samples: other
            indices or, where both logs have texts, other true answers.
    """
    if definition not in _DEFINITIONS:
        raise ValueError(f"definition must be one of {', '.join(_DEFINITIONS)}, got {definition!r}")
    rules = _DEFINITIONS[definition]
    check_log(log)
    measures: dict[str, float | None] = {}
    for part, task in TASKS.items():
        if task in log:
            measures |= {f"{part}_{name}": value for name, value in _measures(part, log[task], rules).items()}
    nine = [value for name, value in measures.items() if not name.startswith("forget_")]
    utility = float(hmean(nine)) if len(nine) == 9 else None
    return {"model_utility": utility, **_forget_quality(log, retain_log, rules), **measures}


class _Definition(NamedTuple):
    log_mean: Callable[[NDArray], NDArray]
    """log of the mean of probabilities, along the second axis, of their logarithms."""
    log_eps: float
    """log of what is added to denominators."""


def _arithmetic(log_probability: NDArray) -> NDArray:
    return logsumexp(log_probability, axis=1) - np.log(log_probability.shape[1])


def _geometric(log_probability: NDArray) -> NDArray:
    return log_probability.mean(axis=1)


_DEFINITIONS = {
    "tofu": _Definition(_arithmetic, -np.inf),
    "open-unlearning": _Definition(_geometric, np.log(1e-10)),
}


def _measures(part: str, task: Mapping[str, Any], rules: _Definition) -> dict[str, float]:
    answer, ratio = -_values(task, "avg_gt_loss"), _log_ratio(task, rules.log_mean, rules.log_eps)
    if part in ("real_authors", "world_facts"):
        options = np.column_stack([answer, -_values(task, "average_perturb_loss")])
        answer = answer - np.logaddexp(logsumexp(options, axis=1), rules.log_eps)
    if part == "forget":
        truth = np.exp(np.minimum(ratio, _log_inverse(ratio, rules.log_eps)))
    else:
        truth = -np.expm1(np.minimum(ratio, 0))
    return {
        "probability": float(np.exp(answer).mean()),
        "rouge": float(_values(task, "rougeL_recall").mean()),
        "truth_ratio": float(truth.mean()),
    }


def _forget_quality(log: TofuLog, retain_log: TofuLog | None, rules: _Definition) -> dict[str, float | None]:
    task = TASKS["forget"]
    if retain_log is None or task not in log:
        return {"forget_quality": None, "ks_statistic": None}
    check_log(retain_log)
    samples = [set(x.get(task, {}).get("avg_gt_loss", ())) for x in (log, retain_log)]
    if samples[0] != samples[1]:
        raise ValueError(
            f"retain_log must have the forget samples of log, which has {len(samples[0])}, got {len(samples[1])}; "
            "evaluate both models on the same forget set"
        )
    _check_same_answers(log[task], retain_log[task])
    # The test asks only for order, which logarithms keep.
    ratios = (_log_ratio(x[task], _geometric, rules.log_eps) for x in (log, retain_log))
    test = ks_2samp(*(_log_inverse(ratio, rules.log_eps) for ratio in ratios))
    return {"forget_quality": float(test.pvalue), "ks_statistic": float(test.statistic)}


def _check_same_answers(task: Mapping[str, Any], retain_task: Mapping[str, Any]) -> None:
    """By the true answers, which stand last: the questions carry the prompt template of either model."""
    texts, retain_texts = (x.get("generated_text") or {} for x in (task, retain_task))
    for sample in (sample for sample in task["avg_gt_loss"] if sample in texts and sample in retain_texts):
        expected, given = texts[sample][-1], retain_texts[sample][-1]
        if expected.strip() != given.strip():
            raise ValueError(
                f"retain_log must have the forget samples of log, whose sample {sample} has the true answer "
                f"{expected!r}, got {given!r}; evaluate both models on the same forget set"
            )


def _log_ratio(task: Mapping[str, Any], log_mean: Callable[[NDArray], NDArray], log_eps: float) -> NDArray:
    false, true = -_values(task, "average_perturb_loss"), -_values(task, "avg_paraphrased_loss")
    return log_mean(false) - np.logaddexp(true, log_eps)


def _log_inverse(log_ratio: NDArray, log_eps: float) -> NDArray:
    return -np.logaddexp(log_ratio, log_eps)


def _values(task: Mapping[str, Any], metric: str) -> NDArray:
    """(S,), or (S, J) of false answers, in the order of the samples of avg_gt_loss."""
    return np.array([task[metric][sample] for sample in task["avg_gt_loss"]], dtype=np.float64)
