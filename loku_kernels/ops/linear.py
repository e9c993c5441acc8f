"""Operators on hidden states and the head: the logits exist one chunk of rows at a time.

Each chunk costs one GEMM for its logits, one sweep that turns them into losses and, in place, into their gradient, and
one GEMM each for the gradients of the hidden states and, if it is trained, of the head. Only rows that count are
visited.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from loku_kernels import gemm, launch, memory
from loku_kernels.backends import formulas, select
from loku_kernels.backends.reference import compute_dtype
from loku_kernels.backends.weights import NO_LOSS, RowWeights
from loku_kernels.ops._operator import operator, operator_of_products, refuse_gradient
from loku_kernels.ops.logits import (
    check_labels,
    empty_reduced,
    empty_table,
    reduced,
    split_statistics,
    statistics_coefficients,
    upstream_of_losses,
)

_Rows = slice | Tensor


class _Gradients:
    """The gradients asked for, filled chunk by chunk; the others are empty, as operators cannot return None."""

    def __init__(self, hidden: Tensor, weight: Tensor, needed: tuple[bool, bool, bool]) -> None:
        need_hidden, need_weight, need_bias = self.needed = needed
        # Sums over rows are formed in float32 at least, and rounded once by whoever returns them.
        total = {"dtype": compute_dtype(hidden.dtype), "device": hidden.device}
        self.hidden = torch.zeros_like(hidden) if need_hidden else hidden.new_empty(0)
        self.weight = torch.zeros(weight.shape if need_weight else (0,), **total)
        self.bias = torch.zeros(weight.shape[:1] if need_bias else (0,), **total)

    def add(self, rows: _Rows, hidden: Tensor, weight: Tensor, grad_logits: Tensor) -> None:
        need_hidden, need_weight, need_bias = self.needed
        if need_hidden:
            self.hidden[rows] = gemm.mm(grad_logits, weight)
        if need_weight:
            gemm.add_outer_(self.weight, grad_logits, hidden)
        if need_bias:
            self.bias += grad_logits.sum(dim=0, dtype=self.bias.dtype)

    def of_vocabulary(self, vocabulary: int) -> tuple[Tensor, Tensor, Tensor]:
        """Of the hidden states, the head's weight and its bias, without what aligned the head."""
        return self.hidden, self.weight[:vocabulary], self.bias[:vocabulary]


@operator_of_products
def linear_unlearning_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    ihl_weight: Tensor | None,
    ihl_factor: float,
    ce_weight: Tensor | None,
    ce_factor: float,
    rows: Tensor | None,
    ignore_index: int,
    scale: float,
    softcap: float,
    reduction: str,
    chunk_bytes: int | None,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The losses and a row's factor, as ``reduced``, table, index, and the gradients of the sum that are asked for.

    ``hidden`` is (N, D), ``weight`` (V, D), ``rows`` the indices of the rows that count, or None where labels tell.
    """
    needed = need_hidden, need_weight, need_bias
    backend = select(hidden)
    kernel = backend.row_losses_and_gradient_ if any(needed) else backend.row_losses
    weights = RowWeights(ihl_weight, ihl_factor, ce_weight, ce_factor)
    table, index = _ignored_table(hidden, labels)
    vocabulary, weight, bias = _aligned_head(weight, bias)
    gradients = _Gradients(hidden, weight, needed)
    for chunk, hidden_chunk, logits in _chunks(hidden, weight, bias, labels, rows, ignore_index, chunk_bytes):
        table[:, chunk], index[chunk] = kernel(
            logits[None, :, :vocabulary],
            labels[chunk],
            weights.of(chunk),
            ignore_index=ignore_index,
            scale=scale,
            softcap=softcap,
        )
        gradients.add(chunk, hidden_chunk, weight, logits)
        del logits  # or there would be two chunks of them while the next is made
    value, factor = reduced(backend, table, labels, ignore_index, reduction)
    return value, factor, table, index, *gradients.of_vocabulary(vocabulary)


@torch.library.register_fake(linear_unlearning_loss.name())
def _(
    hidden,
    weight,
    bias,
    labels,
    ihl_weight,
    ihl_factor,
    ce_weight,
    ce_factor,
    rows,
    ignore_index,
    scale,
    softcap,
    reduction,
    chunk_bytes,
    *needed,
):
    table, index = empty_table(hidden, labels)
    gradients = _Gradients(hidden, weight, needed)
    return *empty_reduced(table, reduction), table, index, gradients.hidden, gradients.weight, gradients.bias


def _save_loss(ctx: Any, inputs: tuple, output: tuple) -> None:
    hidden, weight, bias, labels, _, _, _, _, rows, *ctx.transform, ctx.reduction, ctx.chunk_bytes = inputs[:-3]
    _, factor, table, index, *gradients = output
    ctx.computed = inputs[-3:]
    ctx.mark_non_differentiable(factor, table, index, *gradients)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(hidden, weight, bias, labels, rows, factor, table, index, *gradients)


def _backward_loss(ctx: Any, grad_value: Tensor | None, *_: None) -> tuple:
    if grad_value is None:
        return (None,) * 17
    hidden, weight, bias, labels, rows, factor, table, index, *gradients = ctx.saved_tensors
    needed = ctx.needs_input_grad[:3]
    computed = all(have or not want for have, want in zip(ctx.computed, needed, strict=True))
    upstream = upstream_of_losses(grad_value, factor, ctx.reduction)
    # With create_graph=True, by the operator that refuses to be differentiated: products of what the forward pass has
    # computed would have derivatives, and wrong ones.
    computed = computed and not torch.is_grad_enabled()
    if computed and ctx.reduction != "none":
        gradients = [gradient * upstream for gradient in gradients]
    elif computed and not any(needed[1:]):
        # A row of the hidden states' gradient depends on that row's loss alone; an ignored one's is 0 whatever comes.
        gradients[0] = gradients[0] * upstream.masked_fill(index < 0, 0.0)[:, None]
    else:
        gradients = linear_gradients(
            hidden,
            weight,
            bias,
            labels,
            index,
            table[formulas.COEFFICIENTS],
            upstream.expand(labels.shape),
            rows,
            *ctx.transform,
            ctx.chunk_bytes,
            *needed,
        )
    return _in_dtype_of((hidden, weight, bias), gradients, needed)


torch.library.register_autograd(linear_unlearning_loss.name(), _backward_loss, setup_context=_save_loss)


@operator
def linear_target_statistics(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    rows: Tensor | None,
    ignore_index: int,
    scale: float,
    softcap: float,
    chunk_bytes: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Per row: target logit, runner-up logit, logsumexp of the rest, index of the runner-up, and the full table."""
    settings = ignore_index, scale, softcap, "none", chunk_bytes
    _, _, table, index, *_ = linear_unlearning_loss(
        hidden, weight, bias, labels, *NO_LOSS, rows, *settings, False, False, False
    )
    return *split_statistics(table, index), index, table


@torch.library.register_fake(linear_target_statistics.name())
def _(hidden, weight, bias, labels, rows, ignore_index, scale, softcap, chunk_bytes):
    table, index = empty_table(hidden, labels)
    return table.new_empty(labels.shape), table.new_empty(labels.shape), table.new_empty(labels.shape), index, table


def _save_statistics(ctx: Any, inputs: tuple, output: tuple) -> None:
    hidden, weight, bias, labels, rows, *ctx.settings = inputs
    *_, index, table = output
    ctx.mark_non_differentiable(index, table)
    ctx.save_for_backward(hidden, weight, bias, labels, rows, table, index)


def _backward_statistics(ctx: Any, grad_target: Tensor, grad_runner_up: Tensor, grad_rest: Tensor, *_: Tensor) -> tuple:
    hidden, weight, bias, labels, rows, table, index = ctx.saved_tensors
    coefficients = statistics_coefficients(table, grad_target, grad_runner_up, grad_rest)
    one = torch.ones((), dtype=table.dtype, device=table.device).expand(labels.shape)
    needed = ctx.needs_input_grad[:3]
    gradients = linear_gradients(hidden, weight, bias, labels, index, coefficients, one, rows, *ctx.settings, *needed)
    return _in_dtype_of((hidden, weight, bias), gradients, needed)[:9]


torch.library.register_autograd(linear_target_statistics.name(), _backward_statistics, setup_context=_save_statistics)


@operator_of_products
def linear_gradients(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    index: Tensor,
    coefficients: Tensor,
    upstream: Tensor,
    rows: Tensor | None,
    ignore_index: int,
    scale: float,
    softcap: float,
    chunk_bytes: int | None,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients asked for of sum(upstream * loss), from logits formed once more."""
    backend = select(hidden)
    vocabulary, weight, bias = _aligned_head(weight, bias)
    gradients = _Gradients(hidden, weight, (need_hidden, need_weight, need_bias))
    for chunk, hidden_chunk, logits in _chunks(hidden, weight, bias, labels, rows, ignore_index, chunk_bytes):
        scored = logits[None, :, :vocabulary]
        backend.row_gradient(
            scored,
            labels[chunk],
            index[chunk],
            coefficients[:, chunk].contiguous(),
            upstream[chunk],
            scored,
            ignore_index=ignore_index,
            scale=scale,
            softcap=softcap,
        )
        gradients.add(chunk, hidden_chunk, weight, logits)
        del logits, scored
    return gradients.of_vocabulary(vocabulary)


@torch.library.register_fake(linear_gradients.name())
def _(
    hidden,
    weight,
    bias,
    labels,
    index,
    coefficients,
    upstream,
    rows,
    ignore_index,
    scale,
    softcap,
    chunk_bytes,
    *needed,
):
    gradients = _Gradients(hidden, weight, needed)
    return gradients.hidden, gradients.weight, gradients.bias


refuse_gradient(linear_gradients)


def _ignored_table(hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The table and index as they are when every row is ignored; the rows that count are written into it."""
    table, index = empty_table(hidden, labels)
    return table.zero_(), index.fill_(-1)


def _in_dtype_of(inputs: tuple[Tensor | None, ...], gradients: Sequence[Tensor], needed: tuple[bool, ...]) -> tuple:
    """Gradients as autograd wants them: in the inputs' dtypes, None where not needed, None for the other arguments."""
    found = (
        gradient.to(like.dtype) if wanted else None
        for like, gradient, wanted in zip(inputs, gradients, needed, strict=True)
    )
    return *found, *[None] * 14


def _aligned_head(weight: Tensor, bias: Tensor | None) -> tuple[int, Tensor, Tensor | None]:
    """The vocabulary, and the head with as many more rows, all 0, as its products need to be fast.

    Their logits are 0 and no kernel touches them, so they add nothing to a gradient.
    """
    vocabulary, missing = len(weight), gemm.missing_rows(weight)
    if missing == 0:
        return vocabulary, weight, bias
    weight = torch.nn.functional.pad(weight, (0, 0, 0, missing))
    return vocabulary, weight, None if bias is None else torch.nn.functional.pad(bias, (0, missing))


def _chunks(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    rows: Tensor | None,
    ignore_index: int,
    chunk_bytes: int | None,
) -> Iterator[tuple[_Rows, Tensor, Tensor]]:
    """The rows that count, a chunk at a time (slices where all do, else indices), their hidden states and logits.

    The next chunk's logits may be written over a chunk's.
    """
    check_labels(labels, weight.shape[0], ignore_index)
    _check_rows(rows, hidden.shape[0])
    if rows is None and labels.device.type == "cpu":
        counted = labels != ignore_index
        rows = None if counted.all() else counted.nonzero().squeeze(1)
    n_rows = hidden.shape[0] if rows is None else rows.shape[0]
    if chunk_bytes is None:
        chunk_bytes = launch.default_chunk_bytes(hidden.device.type)
    height = launch.chunk_rows(n_rows, weight.shape[0], hidden.element_size(), chunk_bytes)
    buffer = memory.empty((height, weight.shape[0]), hidden.dtype, hidden.device)
    for start in range(0, n_rows, height):
        chunk = slice(start, min(start + height, n_rows))
        chunk = chunk if rows is None else rows[chunk]
        hidden_chunk = hidden[chunk]
        yield chunk, hidden_chunk, gemm.linear(hidden_chunk, weight, bias, buffer[: len(hidden_chunk)])


def _check_rows(rows: Tensor | None, n_rows: int) -> None:
    """Refuse rows that do not exist, or come twice, where looking costs no synchronisation (on the CPU)."""
    if rows is None or rows.device.type != "cpu":
        return
    outside = (rows < 0) | (rows >= n_rows)
    if outside.any():
        raise ValueError(f"rows must lie in [0, {n_rows}), but {int(rows[outside][0])} was given")
    counts = rows.bincount()
    if (counts > 1).any():
        raise ValueError(f"rows must name each row once, but {int(counts.argmax())} comes {int(counts.max())} times")
