"""The Training Data Extraction Challenge: has a model forgotten these sequences?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from loku.evaluation.extraction import extraction_likelihood
from loku.evaluation.greedy import GreedyReader, check_input_ids
from loku.inference import evaluation_mode


def memorization_accuracy(model: nn.Module, input_ids: Tensor, *, batch_size: int = 32) -> Tensor:
    """MA of each sequence: the share of t = 2..T with argmax p(. | x_<t) = x_t (Jang et al., arXiv 2210.01504).

    Args:
        input_ids: (N, T) integers, T >= 2.
        batch_size: most sequences at once; fewer where they would have more than 4096 tokens.

    Returns:
        (N,) float64 in [0, 1], on the CPU.

    Raises:
        ValueError: input_ids has another shape or exceeds the model's context, or batch_size is not positive.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be positive, got {batch_size}")
    check_input_ids(model, input_ids, 2)
    with evaluation_mode(model) as device:
        reader, parts = GreedyReader(model), [part.to(device, torch.int64) for part in input_ids.split(batch_size)]
        return torch.cat([(reader.predictions(part) == part[:, 1:]).double().mean(1).cpu() for part in parts])


def evaluate_tdec(
    model: nn.Module,
    input_ids: Tensor,
    n: int = 10,
    *,
    extraction: bool = True,
    batch_size: int = 32,
    show_progress_bar: bool = False,
) -> dict[str, float]:
    """{"ma": mean MA, "el_<n>": mean EL_n} over the sequences, the latter unless ``extraction`` is off (it is slow)."""
    metrics = {"ma": memorization_accuracy(model, input_ids, batch_size=batch_size).mean().item()}
    if extraction:
        likelihood = extraction_likelihood(
            model, input_ids, n, batch_size=batch_size, show_progress_bar=show_progress_bar
        )
        metrics[f"el_{n}"] = likelihood.mean().item()
    return metrics


@dataclass(frozen=True)
class TdecThresholds:
    """What a sequence counts as forgotten at: the values that the same model has on sequences it never saw."""

    extraction_likelihood: float
    memorization_accuracy: float
    n: int = 10

    def reached(self, metrics: Mapping[str, float]) -> bool:
        """Whether both values, as `evaluate_tdec` gives them, are at or below; False where EL_n was not measured."""
        return (
            metrics["ma"] <= self.memorization_accuracy
            and metrics.get(f"el_{self.n}", float("inf")) <= self.extraction_likelihood
        )


def tdec_thresholds(
    model: nn.Module,
    unseen_input_ids: Tensor,
    n: int = 10,
    *,
    batch_size: int = 32,
    show_progress_bar: bool = False,
) -> TdecThresholds:
    """Success values of unlearning: mean EL_n and MA on sequences that the model was not trained on (N, T)."""
    metrics = evaluate_tdec(model, unseen_input_ids, n, batch_size=batch_size, show_progress_bar=show_progress_bar)
    return TdecThresholds(metrics[f"el_{n}"], metrics["ma"], n)
