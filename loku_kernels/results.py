"""What the losses return beside the loss, and how rows become one number."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from loku_kernels.backends import formulas


class RowStatistics(NamedTuple):
    """What one sweep learns about every row, each of the labels' shape, without gradient.

    Ignored rows have loss, target_probability and runner_up_probability 0, runner_up_index -1 and correct False.
    """

    loss: Tensor
    """The row's own loss, before any reduction."""
    target_probability: Tensor
    """p_t, the probability of the label."""
    runner_up_probability: Tensor
    """p_m, the largest probability of any other token."""
    runner_up_index: Tensor
    """The token that has it, the lowest on ties (int64)."""
    correct: Tensor
    """Whether argmax, with ties going to the lowest index, is the label (bool); False where
    target_probability is NaN."""


class TargetStatistics(NamedTuple):
    """Four numbers per row, each of the labels' shape, from which token-level losses are a line of torch.

    ``target``, ``runner_up`` and ``rest`` carry gradients to the logits. With q = logaddexp(runner_up, rest) - target:
    p_t = sigmoid(-q), log p_t = logsigmoid(-q), 1 - p_t = sigmoid(q). Ignored rows are 0, with index -1.
    """

    target: Tensor
    """z_t, the label's logit."""
    runner_up: Tensor
    """z_m, the largest other logit."""
    runner_up_index: Tensor
    """m, the lowest on ties (int64)."""
    rest: Tensor
    """logsumexp of z_v over v other than t and m; -inf where there is none, or all are some 90 or more below z_m (700
    in float64), so that exp(z_v - z_m) is 0."""

    @property
    def log_probability(self) -> Tensor:
        """log p_t, differentiable, accurate also where p_t is close to 1; 0 for ignored rows.

        torch.compile follows it from torch 2.11 on: 2.10 knows the fields of a named tuple only.
        """
        # There logaddexp would have gradient NaN, where all of them are 0. Of a row that holds NaN, `rest` is NaN.
        alone = (self.runner_up == -torch.inf) & (self.rest == -torch.inf)
        runner_up, rest = self.runner_up.masked_fill(alone, 0.0), self.rest.masked_fill(alone, 0.0)
        log_p = logsigmoid(self.target - torch.logaddexp(runner_up, rest)).masked_fill(alone, 0.0)
        # An ignored row's target is 0; that of a row whose label is outside the vocabulary NaN.
        return torch.where(self.runner_up_index < 0, self.target, log_p)


def row_statistics(table: Tensor, index: Tensor, labels: Tensor, shape: torch.Size) -> RowStatistics:
    """Read a (7, N) table of the backends; ``labels`` are the flat ones."""
    table = table.detach()
    target, runner_up = table[formulas.TARGET], table[formulas.RUNNER_UP]
    p_target, p_runner_up = formulas.probabilities(target, runner_up, table[formulas.REST])
    counted = index >= 0
    leads = (target > runner_up) | ((target == runner_up) & (labels < index))
    return RowStatistics(
        loss=table[formulas.LOSS].reshape(shape),
        target_probability=torch.where(counted, p_target, table[formulas.LOSS]).reshape(shape),
        runner_up_probability=torch.where(counted, p_runner_up, table[formulas.LOSS]).reshape(shape),
        runner_up_index=index.reshape(shape),
        correct=(leads & counted & ~p_target.isnan()).reshape(shape),
    )


def operator_reduction(reduction: str, num_items_in_batch: float | Tensor | None) -> str:
    """What to ask of an operator: the sum where the mean's divisor is the caller's."""
    return reduction if num_items_in_batch is None else "sum"


def loss_of(value: Tensor, shape: torch.Size, num_items_in_batch: float | Tensor | None) -> Tensor:
    """The loss as the caller wants it, in the labels' ``shape`` if it is that of every row."""
    if num_items_in_batch is not None:
        # 0 / 1 where nothing counts. A float64 tensor would make the loss one.
        return (value / (num_items_in_batch + (num_items_in_batch == 0))).to(value.dtype)
    return value.reshape(shape) if value.dim() else value
