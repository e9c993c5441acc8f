"""Losses from hidden states and the weight of the head, without the logits."""

from __future__ import annotations

from typing import Literal, Unpack, overload

import torch
from torch import Tensor

from loku_kernels import _validation as check
from loku_kernels import gemm, ops
from loku_kernels._options import HeadOptions
from loku_kernels.backends.reference import compute_dtype
from loku_kernels.results import RowStatistics, TargetStatistics, loss_of, operator_reduction, row_statistics


@overload
def fused_linear_ihl(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    return_statistics: Literal[False] = False,
    **options: Unpack[HeadOptions],
) -> Tensor: ...
@overload
def fused_linear_ihl(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, return_statistics: Literal[True], **options: Unpack[HeadOptions]
) -> tuple[Tensor, RowStatistics]: ...
@overload
def fused_linear_ihl(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, return_statistics: bool, **options: Unpack[HeadOptions]
) -> Tensor | tuple[Tensor, RowStatistics]: ...
def fused_linear_ihl(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    rows: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    num_items_in_batch: float | Tensor | None = None,
    shift_labels: bool = False,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    chunk_bytes: int | None = None,
    return_statistics: bool = False,
) -> Tensor | tuple[Tensor, RowStatistics]:
    """``fused_ihl`` of the logits hidden @ weight^T + bias, which exist only a chunk of rows at a time.

    The gradients are computed together with the loss, while a chunk of logits is at hand. With a frozen head that is
    two GEMMs, 4 N V D flops, for N rows that count; a trained head adds a third. Sums over rows, which are the
    gradients of weight and bias, are accumulated in float32. With ``reduction="none"`` and a trained head the logits
    are formed once more in the backward pass, since each row's upstream gradient must be known first; in float16
    always, since a gradient that a loss scaler has not scaled yet may vanish. Without gradients enabled, or if nothing
    requires one, only the losses are computed.

    Args:
        hidden: (..., D) float32, bfloat16, float16, or float64 (by the plain-torch reference).
        weight: (V, D), V >= 2, of the same dtype. Under autocast all three are cast, as for
            ``torch.nn.functional.linear``.
        labels: (...) integers in [0, V), or ``ignore_index``.
        bias: (V,), optional.
        rows: (K,) int64, the indices, each once, into the flattened labels (after any shift) of all rows that count.
            Rows that are not listed never reach the head, and their loss is 0; a mean still divides by all labels that
            count. On the CPU the labels tell; on a GPU their
            number could not be known without waiting for the device, so without ``rows`` ignored rows go through the
            GEMMs.
        chunk_bytes: upper bound for one chunk of logits; at least one row is processed at a time. By default 256
            MiB on a CPU, 512 MiB on a GPU.

    Other arguments, results and errors are those of ``fused_ihl``.

    Memory: at most two chunks of logits at a time whatever N is, and the gradients. A CPU without instructions for
    16-bit products also holds float32 copies of a chunk's hidden states and of a block of the head. On a GPU, where
    a row of V logits is no multiple of 16 bytes, a copy of the head too: its products would take several times as long
    without.
    """
    return fused_linear_unlearning_loss(
        hidden,
        weight,
        labels,
        1.0,
        0.0,
        bias=bias,
        rows=rows,
        ignore_index=ignore_index,
        reduction=reduction,
        num_items_in_batch=num_items_in_batch,
        shift_labels=shift_labels,
        logit_scale=logit_scale,
        logit_softcap=logit_softcap,
        chunk_bytes=chunk_bytes,
        return_statistics=return_statistics,
    )


@overload
def fused_linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    return_statistics: Literal[False] = False,
    **options: Unpack[HeadOptions],
) -> Tensor: ...
@overload
def fused_linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, return_statistics: Literal[True], **options: Unpack[HeadOptions]
) -> tuple[Tensor, RowStatistics]: ...
@overload
def fused_linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, return_statistics: bool, **options: Unpack[HeadOptions]
) -> Tensor | tuple[Tensor, RowStatistics]: ...
def fused_linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    rows: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    num_items_in_batch: float | Tensor | None = None,
    shift_labels: bool = False,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    chunk_bytes: int | None = None,
    return_statistics: bool = False,
) -> Tensor | tuple[Tensor, RowStatistics]:
    """``fused_cross_entropy`` of the logits hidden @ weight^T + bias, which exist only a chunk of rows at a time.

    Arguments, results, memory and cost are those of ``fused_linear_ihl``.
    """
    return fused_linear_unlearning_loss(
        hidden,
        weight,
        labels,
        0.0,
        1.0,
        bias=bias,
        rows=rows,
        ignore_index=ignore_index,
        reduction=reduction,
        num_items_in_batch=num_items_in_batch,
        shift_labels=shift_labels,
        logit_scale=logit_scale,
        logit_softcap=logit_softcap,
        chunk_bytes=chunk_bytes,
        return_statistics=return_statistics,
    )


@overload
def fused_linear_unlearning_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    ihl_weight: float | Tensor,
    ce_weight: float | Tensor,
    *,
    return_statistics: Literal[False] = False,
    **options: Unpack[HeadOptions],
) -> Tensor: ...
@overload
def fused_linear_unlearning_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    ihl_weight: float | Tensor,
    ce_weight: float | Tensor,
    *,
    return_statistics: Literal[True],
    **options: Unpack[HeadOptions],
) -> tuple[Tensor, RowStatistics]: ...
@overload
def fused_linear_unlearning_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    ihl_weight: float | Tensor,
    ce_weight: float | Tensor,
    *,
    return_statistics: bool,
    **options: Unpack[HeadOptions],
) -> Tensor | tuple[Tensor, RowStatistics]: ...
def fused_linear_unlearning_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    ihl_weight: float | Tensor,
    ce_weight: float | Tensor,
    *,
    bias: Tensor | None = None,
    rows: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    num_items_in_batch: float | Tensor | None = None,
    shift_labels: bool = False,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    chunk_bytes: int | None = None,
    return_statistics: bool = False,
) -> Tensor | tuple[Tensor, RowStatistics]:
    """Per row, ihl_weight * IHL + ce_weight * CE, from hidden states: forget and retain rows of one batch in one pass.

    The weights are as in ``fused_unlearning_loss``; everything else is as in ``fused_linear_ihl``.
    """
    hidden, weight, bias = _autocast(hidden, weight, bias)
    _check_inputs(hidden, weight, labels, bias, rows, chunk_bytes)
    check.check_reduction(reduction, num_items_in_batch)
    softcap = check.check_transform(logit_scale, logit_softcap)
    dtype = compute_dtype(hidden.dtype)
    flat = check.flat_labels(labels, ignore_index, shift_labels)
    value, _, table, index, *_ = ops.linear_unlearning_loss(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        bias,
        flat,
        *check.row_weights("ihl_weight", ihl_weight, labels, dtype),
        *check.row_weights("ce_weight", ce_weight, labels, dtype),
        rows,
        ignore_index,
        logit_scale,
        softcap,
        operator_reduction(reduction, num_items_in_batch),
        chunk_bytes,
        *_gradients_known_in_forward(hidden, weight, bias, reduction),
    )
    loss = loss_of(value, labels.shape, num_items_in_batch)
    return (loss, row_statistics(table, index, flat, labels.shape)) if return_statistics else loss


def linear_target_statistics(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    rows: Tensor | None = None,
    ignore_index: int = -100,
    shift_labels: bool = False,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    chunk_bytes: int | None = None,
) -> TargetStatistics:
    """``target_statistics`` of the logits hidden @ weight^T + bias, which exist only a chunk of rows at a time.

    Differentiable with respect to hidden, weight and bias; the backward pass forms the logits once more, so a frozen
    head costs three GEMMs in all. Arguments, errors and memory are those of ``fused_linear_ihl``.
    """
    hidden, weight, bias = _autocast(hidden, weight, bias)
    _check_inputs(hidden, weight, labels, bias, rows, chunk_bytes)
    softcap = check.check_transform(logit_scale, logit_softcap)
    flat = check.flat_labels(labels, ignore_index, shift_labels)
    target, runner_up, rest, index, _ = ops.linear_target_statistics(
        hidden.reshape(-1, hidden.shape[-1]), weight, bias, flat, rows, ignore_index, logit_scale, softcap, chunk_bytes
    )
    shape = labels.shape
    return TargetStatistics(target.reshape(shape), runner_up.reshape(shape), index.reshape(shape), rest.reshape(shape))


def _gradients_known_in_forward(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, reduction: str
) -> tuple[bool, bool, bool]:
    """Which gradients the forward pass can compute: of a sum all, of single rows only those of the hidden states.

    None in float16, whose smallest number is 6e-8: of memorised text all of a row's gradient may vanish unless it is
    formed after a loss scaler's factor is known, in the backward pass.
    """
    if not torch.is_grad_enabled() or hidden.dtype == torch.float16:
        return False, False, False
    need_weight, need_bias = weight.requires_grad, bias is not None and bias.requires_grad
    if reduction == "none" and (need_weight or need_bias):
        return False, False, False
    return hidden.requires_grad, need_weight, need_bias


def _check_inputs(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, rows: Tensor | None, chunk_bytes: int | None
) -> None:
    check.check_floating(hidden=hidden, weight=weight, bias=bias)
    if weight.dim() != 2 or weight.shape[1] == 0:
        raise ValueError(f"weight must be (vocabulary, hidden size), but has shape {tuple(weight.shape)}")
    if hidden.dim() == 0 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"hidden must end in weight's second dimension, {weight.shape[1]}, but has shape {tuple(hidden.shape)}"
        )
    check.check_vocabulary("the first dimension of weight", weight.shape[0])
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must have shape ({weight.shape[0]},), but has shape {tuple(bias.shape)}")
    check.check_labels(labels, hidden.shape[:-1], "hidden")
    check.check_tensors(rows=rows)
    if rows is not None and (rows.dtype != torch.int64 or rows.dim() != 1):
        raise ValueError(
            f"rows must be a one-dimensional int64 tensor, but is {rows.dtype} of shape {tuple(rows.shape)}"
        )
    if chunk_bytes is not None:
        check.check_integer("chunk_bytes", chunk_bytes)
        if chunk_bytes <= 0:
            raise ValueError(f"chunk_bytes must be positive, but is {chunk_bytes}")
    check.check_same_device(hidden=hidden, weight=weight, bias=bias, labels=labels, rows=rows)


def _autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """What autocast does to the operands of a linear layer."""
    check.check_tensors(hidden=tensors[0], weight=tensors[1], bias=tensors[2])
    device = tensors[0].device
    if not gemm.has_autocast(device) or not torch.is_autocast_enabled(device.type):
        return tensors
    dtype = torch.get_autocast_dtype(device.type)
    return tuple(
        tensor.to(dtype) if tensor is not None and tensor.dtype != torch.float64 else tensor for tensor in tensors
    )
