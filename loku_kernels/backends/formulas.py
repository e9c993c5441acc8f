"""What one row's statistics say about its loss: the inverted hinge loss, the cross-entropy, and their gradients.

A row of logits z with target t and runner-up m (the largest logit other than the target's) is summed up by three
numbers: ``target`` = z_t, ``runner_up`` = z_m and ``rest`` = sum of exp(z_v - z_m) over v other than t and m. Leaving t
and m out of the sum is what keeps 1 - p_t and 1 - p_m accurate when either probability is close to 1. The row's
gradient is then

    dz_v = g_rest * exp(z_v - z_m)  for v other than t and m,    dz_m = g_runner_up,    dz_t = g_target.

The C++ and Triton kernels repeat these lines for one row; this file is their definition.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# Rows of the (7, N) table in which every backend returns what it found; the last four are all the gradient kernel
# needs.
LOSS, TARGET, REST, RUNNER_UP, G_TARGET, G_RUNNER_UP, G_REST = range(7)
ROW_FIELDS = 7
COEFFICIENTS = slice(RUNNER_UP, ROW_FIELDS)


class Partials(NamedTuple):
    """A loss and its three gradient coefficients, each of shape (N,)."""

    loss: Tensor
    target: Tensor
    runner_up: Tensor
    rest: Tensor


def inverted_hinge(target: Tensor, runner_up: Tensor, rest: Tensor) -> Partials:
    """L = 1 + p_t - p_m (LoKU, arXiv 2408.06621, section 3.2), with no subtraction of nearly equal numbers."""
    e_t, e_m, r, total = _exponentials(target, runner_up, rest)
    p_t, p_m = e_t / total, e_m / total
    distance = _distance(target, runner_up)
    gap = torch.sign(distance) * torch.expm1(-distance.abs()) / total  # p_m - p_t
    return Partials(
        loss=(r + 2 * e_t) / total,
        target=p_t * (r + 2 * e_m) / total,
        runner_up=-p_m * (r + 2 * e_t) / total,
        rest=p_m * gap,
    )


def cross_entropy(target: Tensor, runner_up: Tensor, rest: Tensor) -> Partials:
    """L = -log p_t."""
    e_t, e_m, r, total = _exponentials(target, runner_up, rest)
    distance = _distance(target, runner_up)
    p_m = e_m / total
    loss = torch.where(distance > 0, torch.log1p(e_m + r), torch.log1p(e_t + r) - distance)
    return Partials(loss=loss, target=-(e_m + r) / total, runner_up=p_m, rest=p_m)


def probabilities(target: Tensor, runner_up: Tensor, rest: Tensor) -> tuple[Tensor, Tensor]:
    """p_t and p_m."""
    e_t, e_m, _, total = _exponentials(target, runner_up, rest)
    return e_t / total, e_m / total


def combine(target: Tensor, runner_up: Tensor, rest: Tensor, ihl_weight: Tensor, ce_weight: Tensor) -> Partials:
    """ihl_weight * IHL + ce_weight * CE; a weight of 0 drops its loss even where that loss is infinite."""

    def weighted(weight: Tensor, value: Tensor) -> Tensor:
        return torch.where(weight == 0, torch.zeros_like(value), weight * value)

    ihl, ce = inverted_hinge(target, runner_up, rest), cross_entropy(target, runner_up, rest)
    return Partials(*(weighted(ihl_weight, i) + weighted(ce_weight, c) for i, c in zip(ihl, ce, strict=True)))


def _distance(target: Tensor, runner_up: Tensor) -> Tensor:
    """target - runner_up; NaN where a logit has overflowed to +inf, so that it is not hidden, as in torch's losses."""
    return (target - runner_up).masked_fill(torch.maximum(target, runner_up) == float("inf"), float("nan"))


def _exponentials(target: Tensor, runner_up: Tensor, rest: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """e_t, e_m, the sum of the others, and the sum of all, on the scale where the larger of e_t and e_m is 1."""
    distance = _distance(target, runner_up)
    smaller = torch.exp(-distance.abs())
    target_leads = distance > 0
    e_t = torch.where(target_leads, torch.ones_like(smaller), smaller)
    e_m = torch.where(target_leads, smaller, torch.ones_like(smaller))
    r = rest * e_m
    return e_t, e_m, r, e_t + e_m + r
