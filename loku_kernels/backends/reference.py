"""The definition of every operation, in plain torch: the oracle of the tests, and the fallback without a compiler.

Works on any device in float64 for float64 inputs and in float32 otherwise. It holds a few tensors of the logits' size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from loku_kernels.backends import formulas
from loku_kernels.backends.weights import RowWeights


def row_losses(
    logits: Tensor,
    labels: Tensor,
    weights: RowWeights,
    *,
    ignore_index: int,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """Statistics, loss and gradient coefficients of every row.

    Args:
        logits: (B, T, V), left as it is.
        labels: (B * T,) int64. A row whose label is ``ignore_index`` gives zeros and index -1; one whose label is
            otherwise outside [0, V) gives NaN and index -1.
        weights: tensors of (B * T,), in the compute dtype, and factors.
        scale, softcap: the loss sees z = scale * logits, or softcap * tanh(scale * logits / softcap) if softcap > 0.

    Returns:
        The (7, B * T) table of ``formulas`` in the compute dtype, and the (B * T,) int64 index of the runner-up.
    """
    z = _transformed(logits, scale, softcap).flatten(0, 1)
    ignored, invalid, target_column = _read_labels(labels, z.shape[1], ignore_index)
    target = z.gather(1, target_column).squeeze(1)
    others = z.scatter(1, target_column, float("-inf"))
    runner_up, index = others.max(dim=1)
    # Where every other logit is -inf, the target's own column ties with them.
    index = torch.where(index == target_column.squeeze(1), (index == 0).long(), index)
    exponentials = torch.exp(others - _finite_reference(runner_up)[:, None])
    rest = exponentials.scatter(1, index[:, None], 0.0).sum(dim=1)
    ihl_weight = _row_weight(target, weights.ihl, weights.ihl_factor)
    ce_weight = _row_weight(target, weights.ce, weights.ce_factor)
    partials = formulas.combine(target, runner_up, rest, ihl_weight, ce_weight)
    rows = torch.stack([partials.loss, target, rest, runner_up, partials.target, partials.runner_up, partials.rest])
    rows = rows.masked_fill(invalid, float("nan")).masked_fill(ignored, 0.0)
    return rows, index.masked_fill(ignored | invalid, -1)


def row_gradient(
    logits: Tensor,
    labels: Tensor,
    index: Tensor,
    coefficients: Tensor,
    upstream: Tensor,
    out: Tensor,
    *,
    ignore_index: int,
    scale: float,
    softcap: float,
) -> None:
    """Write the gradient of sum(upstream * loss) with respect to the logits into ``out``, which may be ``logits``.

    Args:
        logits, out: (B, T, V).
        index: (B * T,) int64, as ``row_losses`` gave it.
        coefficients: (4, B * T): runner_up, g_target, g_runner_up, g_rest.
        upstream: (B * T,), possibly expanded from one value.
    """
    z = _transformed(logits, scale, softcap).flatten(0, 1)
    ignored, invalid, target_column = _read_labels(labels, z.shape[1], ignore_index)
    runner_up, g_target, g_runner_up, g_rest = coefficients
    gradient = g_rest[:, None] * torch.exp(z - _finite_reference(runner_up)[:, None])
    gradient.scatter_(1, index.clamp(min=0)[:, None], g_runner_up[:, None])
    gradient.scatter_(1, target_column, g_target[:, None])
    gradient *= upstream[:, None]
    gradient *= scale if softcap == 0 else scale * (1 - (z / softcap) ** 2)
    gradient.masked_fill_(invalid[:, None], float("nan")).masked_fill_(ignored[:, None], 0.0)
    out.copy_(gradient.view(out.shape))


def row_losses_and_gradient_(
    logits: Tensor,
    labels: Tensor,
    weights: RowWeights,
    *,
    ignore_index: int,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """``row_losses``, with the gradient of each row's loss written over its logits."""
    transform = {"ignore_index": ignore_index, "scale": scale, "softcap": softcap}
    rows, index = row_losses(logits, labels, weights, **transform)
    ones = rows.new_ones(()).expand(rows.shape[1])
    row_gradient(logits, labels, index, rows[formulas.COEFFICIENTS], ones, logits, **transform)
    return rows, index


def reduce_losses(losses: Tensor, labels: Tensor, *, ignore_index: int, mean: bool) -> tuple[Tensor, Tensor]:
    """The sum of (N,) losses, or their mean over the labels that count, and the factor that the sum was multiplied by.

    Where no label counts the factor is 1, so that the mean is 0.
    """
    if not mean:
        return losses.sum(), losses.new_ones(())
    counted = (labels != ignore_index).sum().clamp(min=1)
    return losses.sum() / counted, counted.to(losses.dtype).reciprocal()


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums are formed and statistics returned: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _transformed(logits: Tensor, scale: float, softcap: float) -> Tensor:
    z = logits.to(compute_dtype(logits.dtype)) * scale
    return softcap * torch.tanh(z / softcap) if softcap > 0 else z


def _row_weight(like: Tensor, weight: Tensor | None, factor: float) -> Tensor:
    return like.new_full((), factor) if weight is None else factor * weight


def first_invalid_label(labels: Tensor, vocabulary: int, ignore_index: int) -> int:
    """As ``backends.first_invalid_label``."""
    _, invalid, _ = _read_labels(labels, vocabulary, ignore_index)
    return int(invalid.nonzero()[0]) if invalid.any() else -1


def _read_labels(labels: Tensor, vocabulary: int, ignore_index: int) -> tuple[Tensor, Tensor, Tensor]:
    """Which rows are ignored, which have a label outside the vocabulary, and a column that is safe to gather."""
    ignored = labels == ignore_index
    inside = (labels >= 0) & (labels < vocabulary)
    return ignored, ~ignored & ~inside, labels.clamp(0, vocabulary - 1)[:, None]


def _finite_reference(runner_up: Tensor) -> Tensor:
    """The logit that exponentials are taken relative to; -inf would turn exp(-inf - -inf) into NaN."""
    return torch.where(runner_up == float("-inf"), torch.zeros_like(runner_up), runner_up)
