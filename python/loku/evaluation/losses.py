"""Negative log-likelihood of whole sequences, in batches of similar lengths."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from loku.data.batching import token_budget_batches
from loku.data.collate import UnlearningCollator
from loku.data.examples import Example, without_padding
from loku.data.roles import Role
from loku.fila.progress import progress
from loku.inference import context_length, evaluation_mode, tokens_at_once
from loku.training.scores import Scorer


class SequenceLosses(NamedTuple):
    """Of S sequences, on the CPU."""

    total: Tensor
    """(S,) float64: sum of -log p over the labelled tokens, in nats."""
    tokens: Tensor
    """(S,) int64: how many tokens are scored."""

    @property
    def mean(self) -> Tensor:
        """(S,) float64: nats a token."""
        return self.total / self.tokens


def sequence_losses(
    model: nn.Module,
    examples: Sequence[Example],
    *,
    max_tokens: int | None = None,
    what: str = "losses",
    show_progress_bar: bool = False,
) -> SequenceLosses:
    """-log p(labels | what comes before), summed over each example's labelled tokens after its first token.

    Args:
        examples: any lengths; they are batched by length, so order and batch do not matter beyond rounding.
        max_tokens: tokens in a batch, padding included; by default 4096, or fewer where the model's head cannot be
            taken over (see `loku.training.scores`) and the logits would exceed 256 MiB.

    Raises:
        ValueError: an example has nothing to score or is longer than the model's context.
    """
    examples = [without_padding(example) for example in examples]
    longest, context = max((len(example["input_ids"]) for example in examples), default=0), context_length(model)
    if context is not None and longest > context:
        raise ValueError(f"an example has {longest} tokens, more than the model's context of {context}")
    collate = UnlearningCollator()
    total = torch.zeros(len(examples), dtype=torch.float64)
    tokens = torch.zeros(len(examples), dtype=torch.int64)
    scorer = Scorer(model)
    max_tokens = max_tokens or tokens_at_once(model, holds_logits=scorer.refusal is not None)
    batches = token_budget_batches(examples, max_tokens)
    with evaluation_mode(model) as device:
        for indices in progress(batches, what, "batch", show_progress_bar):
            batch = collate([{Role.RETAIN: examples[i]} for i in indices])
            scores = scorer(model, {name: tensor.to(device) for name, tensor in batch.items()})
            sequences = torch.tensor(indices)[batch["row_sequences"]]
            total.index_add_(0, sequences, -scores.log_probabilities().double().cpu())
            tokens.index_add_(0, sequences, torch.ones_like(sequences))
    return SequenceLosses(total, tokens)
