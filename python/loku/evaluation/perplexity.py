"""Perplexity of any text."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn

from loku.data.examples import Example
from loku.evaluation.losses import sequence_losses


def perplexity(
    model: nn.Module,
    examples: Sequence[Example] | Tensor,
    *,
    max_tokens: int | None = None,
    show_progress_bar: bool = False,
) -> float:
    """exp(sum of -log p over all scored tokens / their number): each token counts the same, whatever its sequence.

    Args:
        examples: as `loku.data.tokenise` gives them, or (N, T) integers, of which all but each row's first are scored.
        max_tokens: see `sequence_losses`.

    Raises:
        ValueError: there are no examples, one has nothing to score or is longer than the model's context.
    """
    if isinstance(examples, Tensor):
        examples = [{"input_ids": row, "labels": row} for row in examples.tolist()]
    if len(examples) == 0:
        raise ValueError("examples must not be empty")
    losses = sequence_losses(
        model, examples, max_tokens=max_tokens, what="perplexity", show_progress_bar=show_progress_bar
    )
    mean = (losses.total.sum() / losses.tokens.sum()).item()
    return math.exp(mean) if mean < 700 else math.inf if not math.isnan(mean) else math.nan
