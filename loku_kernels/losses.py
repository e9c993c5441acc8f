"""Losses from logits."""

from __future__ import annotations

from typing import Literal, Unpack, overload

import torch
from torch import Tensor

from loku_kernels import _validation as check
from loku_kernels import ops
from loku_kernels._graph import is_compiled
from loku_kernels._options import LogitOptions
from loku_kernels.backends.reference import compute_dtype
from loku_kernels.results import RowStatistics, TargetStatistics, loss_of, operator_reduction, row_statistics


@overload
def fused_ihl(
    logits: Tensor, labels: Tensor, *, return_statistics: Literal[False] = False, **options: Unpack[LogitOptions]
) -> Tensor: ...
@overload
def fused_ihl(
    logits: Tensor, labels: Tensor, *, return_statistics: Literal[True], **options: Unpack[LogitOptions]
) -> tuple[Tensor, RowStatistics]: ...
@overload
def fused_ihl(
    logits: Tensor, labels: Tensor, *, return_statistics: bool, **options: Unpack[LogitOptions]
) -> Tensor | tuple[Tensor, RowStatistics]: ...
def fused_ihl(
    logits: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    num_items_in_batch: float | Tensor | None = None,
    shift_labels: bool = False,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    inplace: bool = False,
    return_statistics: bool = False,
) -> Tensor | tuple[Tensor, RowStatistics]:
    """Inverted hinge loss: per row 1 + p_t - p_m, with p = softmax(logits), t the label and m the likeliest other
    token.

    LoKU, arXiv 2408.06621, section 3.2. One sweep over the logits forward and one backward; no softmax is stored. The
    loss lies in (0, 2) and its gradient with respect to a row of logits sums to zero. It stays accurate to float32
    rounding where p_t or p_m is within 1e-12 of 1.

    Args:
        logits: (..., V) float32, bfloat16, float16, or float64 (by the plain-torch reference). V >= 2. Any strides:
            rows whose elements are not adjacent are copied first. -inf is allowed.
        labels: (...) integers in [0, V), or ``ignore_index``.
        ignore_index: rows with this label add nothing and get a zero gradient; their logits are not read.
        reduction: "none" gives the loss of every row, in the labels' shape; "sum" their sum; "mean" the sum divided by
            the number of labels that count, or by ``num_items_in_batch``. If every label is ignored all are 0, with
            zero gradients, where torch's losses give NaN for the mean.
        num_items_in_batch: the divisor of the mean, as transformers' Trainer passes it under gradient accumulation: a
            number, or a tensor that holds one. 0, of a batch in which no label counts, gives 0.
        shift_labels: score position i of the last label dimension against label i + 1 (causal language models), without
            copying the logits. The last position is ignored.
        logit_scale, logit_softcap: the loss is that of z = logit_scale * logits, or of
            softcap * tanh(logit_scale * logits / softcap).
        inplace: let the backward pass write the gradient over ``logits``, which then needs no memory of its own. The
            logits are as they were until then; a second backward pass raises. Where that cannot be checked, under
            torch.compile, for logits that a compiled model gave, and with ``create_graph=True``, the gradient gets
            memory of its own after all.
        return_statistics: also return a ``RowStatistics``, at no further cost.

    Returns:
        The loss, float32 (float64 for float64 logits), and on request the statistics. The gradient has the logits'
        dtype.

    Raises:
        TypeError: a dtype that is not served.
        ValueError: shapes or devices that do not fit, an unknown reduction, or a label outside the vocabulary. On a GPU
            labels are not checked, as that would wait for the device: there such a row has loss NaN and gradient NaN,
            as a row has everywhere that holds NaN or +inf, unless it is ignored.

    Memory: a few floats per row; backward, the gradient. On CPUs a large gradient reuses the memory of earlier ones
    that are no longer referred to (``empty_cache`` gives it back).
    """
    return fused_unlearning_loss(
        logits,
        labels,
        1.0,
        0.0,
        ignore_index=ignore_index,
        reduction=reduction,
        num_items_in_batch=num_items_in_batch,
        shift_labels=shift_labels,
        logit_scale=logit_scale,
        logit_softcap=logit_softcap,
        inplace=inplace,
        return_statistics=return_statistics,
    )


@overload
def fused_cross_entropy(
    logits: Tensor, labels: Tensor, *, return_statistics: Literal[False] = False, **options: Unpack[LogitOptions]
) -> Tensor: ...
@overload
def fused_cross_entropy(
    logits: Tensor, labels: Tensor, *, return_statistics: Literal[True], **options: Unpack[LogitOptions]
) -> tuple[Tensor, RowStatistics]: ...
@overload
def fused_cross_entropy(
    logits: Tensor, labels: Tensor, *, return_statistics: bool, **options: Unpack[LogitOptions]
) -> Tensor | tuple[Tensor, RowStatistics]: ...
def fused_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    num_items_in_batch: float | Tensor | None = None,
    shift_labels: bool = False,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    inplace: bool = False,
    return_statistics: bool = False,
) -> Tensor | tuple[Tensor, RowStatistics]:
    """Cross-entropy: per row -log p_t, with p = softmax(logits) and t the label.

    The loss of the retain set. Arguments, results and memory are those of ``fused_ihl``.
    """
    return fused_unlearning_loss(
        logits,
        labels,
        0.0,
        1.0,
        ignore_index=ignore_index,
        reduction=reduction,
        num_items_in_batch=num_items_in_batch,
        shift_labels=shift_labels,
        logit_scale=logit_scale,
        logit_softcap=logit_softcap,
        inplace=inplace,
        return_statistics=return_statistics,
    )


@overload
def fused_unlearning_loss(
    logits: Tensor,
    labels: Tensor,
    ihl_weight: float | Tensor,
    ce_weight: float | Tensor,
    *,
    return_statistics: Literal[False] = False,
    **options: Unpack[LogitOptions],
) -> Tensor: ...
@overload
def fused_unlearning_loss(
    logits: Tensor,
    labels: Tensor,
    ihl_weight: float | Tensor,
    ce_weight: float | Tensor,
    *,
    return_statistics: Literal[True],
    **options: Unpack[LogitOptions],
) -> tuple[Tensor, RowStatistics]: ...
@overload
def fused_unlearning_loss(
    logits: Tensor,
    labels: Tensor,
    ihl_weight: float | Tensor,
    ce_weight: float | Tensor,
    *,
    return_statistics: bool,
    **options: Unpack[LogitOptions],
) -> Tensor | tuple[Tensor, RowStatistics]: ...
def fused_unlearning_loss(
    logits: Tensor,
    labels: Tensor,
    ihl_weight: float | Tensor,
    ce_weight: float | Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    num_items_in_batch: float | Tensor | None = None,
    shift_labels: bool = False,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    inplace: bool = False,
    return_statistics: bool = False,
) -> Tensor | tuple[Tensor, RowStatistics]:
    """Per row, ihl_weight * IHL + ce_weight * CE: forget and retain rows of one batch in one pass.

    Args:
        ihl_weight, ce_weight: a number, or a tensor that broadcasts to the labels' shape, without gradient; shifted
            labels keep the weights of the positions that predict them. A negative
            ``ce_weight`` is gradient ascent. Where a weight is 0 its loss is left out, even if infinite. A mean divides
            by the number of labels that count, whatever their weights.

    Other arguments, results and memory are those of ``fused_ihl``.
    """
    labels = _checked_labels(logits, labels)
    check.check_reduction(reduction, num_items_in_batch)
    softcap = check.check_transform(logit_scale, logit_softcap)
    if torch.compiler.is_compiling() or (inplace and is_compiled(logits)):
        inplace = False  # what is compiled does not see that the backward pass writes over what others may have saved
    if inplace:
        check.check_writable(logits)
    dtype = compute_dtype(logits.dtype)
    flat = check.flat_labels(labels, ignore_index, shift_labels)
    value, _, table, index = ops.unlearning_loss(
        _three_dimensional(logits),
        flat,
        *check.row_weights("ihl_weight", ihl_weight, labels, dtype),
        *check.row_weights("ce_weight", ce_weight, labels, dtype),
        ignore_index,
        logit_scale,
        softcap,
        operator_reduction(reduction, num_items_in_batch),
        inplace,
    )
    loss = loss_of(value, labels.shape, num_items_in_batch)
    return (loss, row_statistics(table, index, flat, labels.shape)) if return_statistics else loss


def target_statistics(
    logits: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    shift_labels: bool = False,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
) -> TargetStatistics:
    """The label's logit, the largest other logit and its index, and the logsumexp of all the rest, per row.

    A differentiable primitive: write a token-level loss as a line of torch on the results, and one sweep over the
    logits gives the loss, one more its gradient. NPO, SimNPO and DPO need log p_t, for example, which is the
    ``log_probability`` of what is returned, accurate also where p_t is close to 1.

    The gradients are exp(z_v - rest) for ``rest`` at every v other than t and m, and 1 for ``target`` and ``runner_up``
    at t and m. Arguments and errors are those of ``fused_ihl``; memory is a few floats per row, and the gradient in
    backward.
    """
    labels = _checked_labels(logits, labels)
    softcap = check.check_transform(logit_scale, logit_softcap)
    flat = check.flat_labels(labels, ignore_index, shift_labels)
    target, runner_up, rest, index, _ = ops.target_statistics(
        _three_dimensional(logits), flat, ignore_index, logit_scale, softcap
    )
    shape = labels.shape
    return TargetStatistics(target.reshape(shape), runner_up.reshape(shape), index.reshape(shape), rest.reshape(shape))


def _checked_labels(logits: Tensor, labels: Tensor) -> Tensor:
    check.check_floating(logits=logits)
    if logits.dim() == 0:
        raise ValueError("logits must have a last dimension over the vocabulary, but is a scalar")
    check.check_vocabulary("the last dimension of logits", logits.shape[-1])
    check.check_labels(labels, logits.shape[:-1], "logits")
    check.check_same_device(logits=logits, labels=labels)
    return labels


def _three_dimensional(logits: Tensor) -> Tensor:
    """(B, T, V), the layout whose strides the kernels follow, so that slices of a batch need no copy."""
    if logits.dim() > 3:
        return logits.flatten(0, -3)
    return logits[(None,) * (3 - logits.dim())]
