"""Operators on logits: one sweep forward, one sweep backward, nothing of the logits' size kept between them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from loku_kernels import memory
from loku_kernels.backends import first_invalid_label, formulas, select
from loku_kernels.backends.reference import compute_dtype
from loku_kernels.backends.weights import NO_LOSS, RowWeights
from loku_kernels.ops._operator import operator, operator_on, refuse_gradient

_SMALL_REST = 1e-15


@operator
def unlearning_loss(
    logits: Tensor,
    labels: Tensor,
    ihl_weight: Tensor | None,
    ihl_factor: float,
    ce_weight: Tensor | None,
    ce_factor: float,
    ignore_index: int,
    scale: float,
    softcap: float,
    reduction: str,
    inplace: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of ihl_weight * IHL + ce_weight * CE of each row of logits (B, T, V): all, their sum or their mean, and the
    factor of a row in it, as ``reduced``; the table of statistics, and the runner-up's index.

    A row's weight is the factor, times its entry of the tensor (N,) if there is one. ``inplace`` lets the backward pass
    write the gradient over the logits.
    """
    check_labels(labels, logits.shape[-1], ignore_index)
    backend = select(logits)
    rows, index = backend.row_losses(
        unit_last_stride(logits),
        labels,
        RowWeights(ihl_weight, ihl_factor, ce_weight, ce_factor),
        ignore_index=ignore_index,
        scale=scale,
        softcap=softcap,
    )
    value, factor = reduced(backend, rows, labels, ignore_index, reduction)
    return value, factor, rows, index


@torch.library.register_fake(unlearning_loss.name())
def _(logits, labels, ihl_weight, ihl_factor, ce_weight, ce_factor, ignore_index, scale, softcap, reduction, inplace):
    table, index = empty_table(logits, labels)
    return *empty_reduced(table, reduction), table, index


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    logits, labels, _, _, _, _, ctx.ignore_index, ctx.scale, ctx.softcap, ctx.reduction, ctx.inplace = inputs
    _, factor, rows, index = output
    ctx.wrote_over_logits = False
    ctx.mark_non_differentiable(factor, rows, index)
    ctx.set_materialize_grads(False)  # or zeros of the table's size would be filled in for it
    ctx.save_for_backward(logits, labels, index, factor, rows)


def _backward(ctx: Any, grad_value: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_value is None:
        return (None,) * 11
    logits, labels, index, factor, rows = ctx.saved_tensors
    upstream = upstream_of_losses(grad_value, factor, ctx.reduction).expand(labels.shape)
    arguments = (labels, index, rows[formulas.COEFFICIENTS], upstream, ctx.ignore_index, ctx.scale, ctx.softcap)
    if ctx.inplace and not torch.is_grad_enabled():
        # autograd finds this itself, except where hooks of saved tensors (save_on_cpu) return what they were given.
        if ctx.wrote_over_logits:
            raise RuntimeError("the logits are gone: an earlier backward pass with inplace=True wrote over them")
        ctx.wrote_over_logits = True
        logits = logits.detach()
        row_gradient_(logits, *arguments)
        gradient = logits
    else:
        gradient = row_gradient(logits, *arguments)
    return gradient, *[None] * 10


torch.library.register_autograd(unlearning_loss.name(), _backward, setup_context=_save)


@operator
def target_statistics(
    logits: Tensor, labels: Tensor, ignore_index: int, scale: float, softcap: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Per row: target logit, runner-up logit, logsumexp of the rest, index of the runner-up, and the full table."""
    check_labels(labels, logits.shape[-1], ignore_index)
    rows, index = select(logits).row_losses(
        unit_last_stride(logits), labels, NO_LOSS, ignore_index=ignore_index, scale=scale, softcap=softcap
    )
    return *split_statistics(rows, index), index, rows


@torch.library.register_fake(target_statistics.name())
def _(logits, labels, ignore_index, scale, softcap):
    rows, index = empty_table(logits, labels)
    return rows.new_empty(labels.shape), rows.new_empty(labels.shape), rows.new_empty(labels.shape), index, rows


def _save_statistics(ctx: Any, inputs: tuple, output: tuple) -> None:
    logits, labels, ctx.ignore_index, ctx.scale, ctx.softcap = inputs
    *_, index, rows = output
    ctx.mark_non_differentiable(index, rows)
    ctx.save_for_backward(logits, labels, index, rows)


def _backward_statistics(
    ctx: Any, grad_target: Tensor, grad_runner_up: Tensor, grad_rest: Tensor, *_: Tensor | None
) -> tuple[Tensor | None, ...]:
    logits, labels, index, rows = ctx.saved_tensors
    coefficients = statistics_coefficients(rows, grad_target, grad_runner_up, grad_rest)
    one = torch.ones((), dtype=rows.dtype, device=rows.device).expand(labels.shape)
    gradient = row_gradient(logits, labels, index, coefficients, one, ctx.ignore_index, ctx.scale, ctx.softcap)
    return gradient, None, None, None, None


torch.library.register_autograd(target_statistics.name(), _backward_statistics, setup_context=_save_statistics)


@operator
def row_gradient(
    logits: Tensor,
    labels: Tensor,
    index: Tensor,
    coefficients: Tensor,
    upstream: Tensor,
    ignore_index: int,
    scale: float,
    softcap: float,
) -> Tensor:
    """The gradient with respect to the logits, in a tensor of its own."""
    out = memory.empty(logits.shape, logits.dtype, logits.device)
    select(logits).row_gradient(
        unit_last_stride(logits),
        labels,
        index,
        coefficients,
        upstream,
        out,
        ignore_index=ignore_index,
        scale=scale,
        softcap=softcap,
    )
    return out


@torch.library.register_fake(row_gradient.name())
def _(logits, labels, index, coefficients, upstream, ignore_index, scale, softcap):
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


refuse_gradient(row_gradient)


@operator_on("logits")
def row_gradient_(
    logits: Tensor,
    labels: Tensor,
    index: Tensor,
    coefficients: Tensor,
    upstream: Tensor,
    ignore_index: int,
    scale: float,
    softcap: float,
) -> None:
    """The gradient with respect to the logits, written over them."""
    select(logits).row_gradient(
        logits,
        labels,
        index,
        coefficients,
        upstream,
        logits,
        ignore_index=ignore_index,
        scale=scale,
        softcap=softcap,
    )


@torch.library.register_fake(row_gradient_.name())
def _(logits, labels, index, coefficients, upstream, ignore_index, scale, softcap):
    return None


def reduced(backend: Any, table: Tensor, labels: Tensor, ignore_index: int, reduction: str) -> tuple[Tensor, Tensor]:
    """What an operator returns of the table's (N,) losses: all of them ("none"), their "sum", or their "mean" over the
    labels that count; and by what a row's loss was multiplied, or nothing of "none"."""
    losses = table[formulas.LOSS]
    if reduction == "none":
        return losses.clone(), losses.new_empty(0)
    return backend.reduce_losses(losses, labels, ignore_index=ignore_index, mean=reduction == "mean")


def empty_reduced(table: Tensor, reduction: str) -> tuple[Tensor, Tensor]:
    """What `reduced` returns, uninitialised."""
    if reduction == "none":
        return table.new_empty(table.shape[1:]), table.new_empty(0)
    return table.new_empty(()), table.new_empty(())


def upstream_of_losses(grad_value: Tensor, factor: Tensor, reduction: str) -> Tensor:
    """The gradient of the rows' losses, (N,) or one number, from that of what `reduced` made of them."""
    return grad_value if reduction == "none" else grad_value * factor


def empty_table(like: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """An uninitialised (7, N) table in the compute dtype of ``like``, and an (N,) index."""
    rows = labels.new_empty((formulas.ROW_FIELDS, *labels.shape), dtype=compute_dtype(like.dtype))
    return rows, labels.new_empty(labels.shape)


def split_statistics(table: Tensor, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Target logit, runner-up logit and logsumexp of the rest; zeros for ignored rows, as in the table."""
    target, runner_up, rest = table[formulas.TARGET], table[formulas.RUNNER_UP], table[formulas.REST]
    # Without a runner-up the row was ignored, or its label was invalid and every entry is NaN already.
    rest = torch.where(index < 0, runner_up, runner_up + torch.log(rest))
    return target.clone(), runner_up.clone(), rest


def statistics_coefficients(rows: Tensor, grad_target: Tensor, grad_runner_up: Tensor, grad_rest: Tensor) -> Tensor:
    """The gradient kernel's (4, N) coefficients for given gradients of target, runner-up and rest.

    d rest / d z_v = exp(z_v - rest) = exp(z_v - z_m) / REST, or exp(z_v - (z_m + log REST)) where dividing by REST
    might overflow. Where nothing is left over, REST is 0 and so is the gradient.
    """
    runner_up, rest_sum = rows[formulas.RUNNER_UP], rows[formulas.REST]
    is_none, is_small = rest_sum == 0, (rest_sum > 0) & (rest_sum < _SMALL_REST)
    reference = torch.where(is_small, runner_up + torch.log(rest_sum), runner_up)
    g_rest = torch.where(is_small, grad_rest, grad_rest / rest_sum).masked_fill(is_none, 0.0)
    return torch.stack([reference, grad_target, grad_runner_up, g_rest])


def unit_last_stride(logits: Tensor) -> Tensor:
    """The kernels read rows of adjacent elements; any other layout is copied into one."""
    return logits if logits.stride(-1) == 1 else logits.clone(memory_format=torch.contiguous_format)


def check_labels(labels: Tensor, vocabulary: int, ignore_index: int) -> None:
    """Refuse labels outside the vocabulary where looking costs no synchronisation (on the CPU)."""
    if labels.device.type != "cpu":
        return
    row = first_invalid_label(labels, vocabulary, ignore_index)
    if row >= 0:
        raise ValueError(
            f"labels must lie in [0, {vocabulary}) or be ignore_index ({ignore_index}), "
            f"but label {int(labels[row])} was given (row {row} of the flattened labels)"
        )
