"""The diagonal Fisher information of a layer, added in place; ``reference_fisher`` is the definition.

``fisher_accumulate``: fisher += sum over sequences s of weights[s] * (grad_outputs_s^T inputs_s)^2, elementwise. It has
the FLOPs of the layer's weight gradient, and 2 more an element and sequence. The Fisher matrix is read once and written
once; the operands are read once for each row or column of tiles, mostly from the L2 cache. Nothing else is stored: a
program has one tile, keeps the gradient of the sequence at hand and the sum of the squares in registers, and goes
through all tokens.

Sequences are short, a few steps of BLOCK_TOKENS each, so a loop over sequences around a loop over tokens would fill and
drain the pipeline of loads every few steps. There is one loop instead, over the steps of all sequences, and a step that
ends a sequence squares its gradient. What is lost is part of each sequence's last step, half of one on average.

``fisher_accumulate_grad``: fisher += scale * grad^2. Reads both, writes one.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from loku_kernels.backends.triton import fisher_launch, launch
from loku_kernels.backends.triton.configurations import TRITON_TYPES, Configuration

INTERPRETED = tl.constexpr(launch.INTERPRETED)
COUNTED_AT_ONCE = tl.constexpr(256)

POINTERS = ("fisher_ptr", "inputs_ptr", "grad_outputs_ptr", "offsets_ptr", "weights_ptr")
SIZES = ("out_granules", "in_granules", "T", "S")
STRIDES = ("fisher_stride", "inputs_stride", "grad_outputs_stride")
GRAD_POINTERS = ("fisher_ptr", "grad_ptr")
GRAD_INTEGERS = ("granules", "fisher_stride", "grad_stride", "grad_column_stride")


@triton.jit
def load_offset(offsets_ptr, s, S):
    """Where sequence ``s`` starts and ``s - 1`` ends; past the last sequence, where that one ends."""
    return tl.load(offsets_ptr + tl.minimum(s, S))


@triton.jit
def clamp(offset, T):
    """Kept inside the operands whatever the offsets say."""
    return tl.minimum(tl.maximum(offset, 0), T).to(tl.int32)


@triton.jit
def count_steps(offsets_ptr, S, T, BLOCK_TOKENS: tl.constexpr):
    """Steps of all sequences; one without tokens takes a step too."""
    steps = tl.zeros((COUNTED_AT_ONCE,), tl.int32)
    for first in range(0, S, COUNTED_AT_ONCE):
        s = first + tl.arange(0, COUNTED_AT_ONCE)
        start, end = clamp(load_offset(offsets_ptr, s, S), T), clamp(load_offset(offsets_ptr, s + 1, S), T)
        steps += tl.where(s < S, tl.maximum(tl.cdiv(end - start, BLOCK_TOKENS), 1), 0)
    return tl.sum(steps)


@triton.jit
def load_tile(ptr, token, stride, column, inside, GRANULE: tl.constexpr):
    """Those columns of those tokens, 0 where not ``inside``; of ``token`` and ``column`` one is a row, one a column."""
    pointers = ptr + token.to(tl.int64) * stride + column
    if GRANULE > 1:
        pointers = tl.multiple_of(pointers, (16, 16))
    tile = tl.load(pointers, mask=inside, other=0.0)
    if INTERPRETED:
        tile = tile.to(tl.float32)  # the interpreter would multiply the bits of a bfloat16 as an integer
    return tile


# One program a (BLOCK_OUT, BLOCK_IN) tile. Sizes and strides come in granules, which tells the compiler what they are
# multiples of.
@triton.jit(do_not_specialize=SIZES + STRIDES, do_not_specialize_on_alignment=POINTERS)
def fisher_accumulate_kernel(
    fisher_ptr,  # (out, in) float32, strides (fisher_stride * GRANULE, 1)
    inputs_ptr,  # (T, in), strides (inputs_stride * GRANULE, 1)
    grad_outputs_ptr,  # (T, out), strides (grad_outputs_stride * GRANULE, 1)
    offsets_ptr,  # (S + 1,) int64
    weights_ptr,  # (S,)
    out_granules: tl.int32, in_granules: tl.int32, T: tl.int32, S: tl.int32,
    fisher_stride: tl.int64, inputs_stride: tl.int64, grad_outputs_stride: tl.int64,
    BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr, BLOCK_TOKENS: tl.constexpr, GROUP: tl.constexpr,
    GRANULE: tl.constexpr,
):  # fmt: skip
    out_features, in_features = out_granules * GRANULE, in_granules * GRANULE
    tiles_out, tiles_in = tl.cdiv(out_features, BLOCK_OUT), tl.cdiv(in_features, BLOCK_IN)
    tile = tl.program_id(0)
    tile_out, tile_in = tl.swizzle2d(tile // tiles_in, tile % tiles_in, tiles_out, tiles_in, GROUP)
    out = (tile_out * BLOCK_OUT + tl.arange(0, BLOCK_OUT))[:, None]
    column = (tile_in * BLOCK_IN + tl.arange(0, BLOCK_IN))[None, :]

    squares = tl.zeros((BLOCK_OUT, BLOCK_IN), tl.float32)  # summed over the sequences that have ended
    gradient = tl.zeros((BLOCK_OUT, BLOCK_IN), tl.float32)  # of the sequence at hand, so far
    sequence = 0
    start = clamp(load_offset(offsets_ptr, 0, S), T)
    end = clamp(load_offset(offsets_ptr, 1, S), T)
    next_offset = load_offset(offsets_ptr, 2, S)
    for _ in range(count_steps(offsets_ptr, S, T, BLOCK_TOKENS)):
        token = start + tl.arange(0, BLOCK_TOKENS)
        g_token, x_token = token[None, :], token[:, None]
        g_inside, x_inside = (g_token < end) & (out < out_features), (x_token < end) & (column < in_features)
        g = load_tile(grad_outputs_ptr, g_token, grad_outputs_stride * GRANULE, out, g_inside, GRANULE)
        x = load_tile(inputs_ptr, x_token, inputs_stride * GRANULE, column, x_inside, GRANULE)
        gradient = tl.dot(g, x, gradient, input_precision="ieee")
        weight = tl.load(weights_ptr + sequence)
        ends = start + BLOCK_TOKENS >= end
        if ends & (start < end):
            squares += weight * (gradient * gradient)
            gradient = tl.zeros((BLOCK_OUT, BLOCK_IN), tl.float32)
        start = tl.where(ends, end, start + BLOCK_TOKENS)
        end = tl.where(ends, clamp(next_offset, T), end)
        sequence += ends.to(tl.int32)
        next_offset = load_offset(offsets_ptr, sequence + 2, S)  # used a step later: the product hides its latency

    positions = fisher_ptr + out.to(tl.int64) * (fisher_stride * GRANULE) + column
    if GRANULE > 1:
        positions = tl.multiple_of(positions, (16, 16))
    inside = (out < out_features) & (column < in_features)
    tl.store(positions, tl.load(positions, mask=inside) + squares, mask=inside)


def fisher_accumulate(fisher: Tensor, inputs: Tensor, grad_outputs: Tensor, offsets: Tensor, weights: Tensor) -> None:
    """As ``reference_fisher.fisher_accumulate``."""
    out_features, in_features = fisher.shape
    (T, _), (S,) = inputs.shape, weights.shape
    if fisher.numel() == 0:
        return
    granule = fisher_launch.granule(inputs.element_size(), fisher, inputs, grad_outputs)
    chosen = fisher_launch.accumulate_launch(fisher.shape, T, S, inputs.element_size(), granule)
    tiles = triton.cdiv(out_features, chosen["BLOCK_OUT"]) * triton.cdiv(in_features, chosen["BLOCK_IN"])
    with torch.cuda.device_of(fisher):
        fisher_accumulate_kernel[(tiles,)](
            fisher, inputs, grad_outputs, offsets, weights,
            out_features // granule, in_features // granule, T, S,
            *(tensor.stride(0) // granule for tensor in (fisher, inputs, grad_outputs)),
            GRANULE=granule, **chosen,
        )  # fmt: skip


# One program for every COLUMNS columns of a row. A granule is 16 bytes of ``fisher``: were it 16 bytes of a gradient in
# half precision, the two would have to be brought together through shared memory.
@triton.jit(do_not_specialize=GRAD_INTEGERS, do_not_specialize_on_alignment=GRAD_POINTERS)
def fisher_accumulate_grad_kernel(
    fisher_ptr,  # (rows, columns) float32, strides (fisher_stride * GRANULE, 1)
    grad_ptr,  # (rows, columns), strides (grad_stride * GRANULE, grad_column_stride); the latter is 1 if GRANULE > 1
    granules: tl.int64, fisher_stride: tl.int64, grad_stride: tl.int64, grad_column_stride: tl.int64,
    scale: tl.float32,
    COLUMNS: tl.constexpr, GRANULE: tl.constexpr,
):  # fmt: skip
    columns = granules * GRANULE
    parts = tl.cdiv(columns, COLUMNS)
    row = tl.program_id(0) // parts
    column = tl.program_id(0) % parts * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < columns
    fisher = fisher_ptr + row * (fisher_stride * GRANULE) + column
    grad = grad_ptr + row * (grad_stride * GRANULE)
    if GRANULE > 1:
        fisher = tl.multiple_of(fisher, 16)
        grad = tl.multiple_of(grad + column, GRANULE * grad_ptr.dtype.element_ty.primitive_bitwidth // 8)
    else:
        grad += column * grad_column_stride
    g = tl.load(grad, mask=inside, other=0.0).to(tl.float32)
    tl.store(fisher, tl.load(fisher, mask=inside, other=0.0) + scale * (g * g), mask=inside)


def fisher_accumulate_grad(fisher: Tensor, grad: Tensor, scale: float) -> None:
    """As ``reference_fisher.fisher_accumulate_grad``."""
    if fisher.numel() == 0:
        return
    if fisher.is_contiguous() and grad.is_contiguous():
        fisher, grad = fisher.view(1, -1), grad.view(1, -1)
    rows, columns = fisher.shape
    granule = fisher_launch.granule(fisher.element_size(), fisher, grad)
    chosen = fisher_launch.grad_launch(columns, granule)
    with torch.cuda.device_of(fisher):
        fisher_accumulate_grad_kernel[(rows * triton.cdiv(columns, chosen["COLUMNS"]),)](
            fisher, grad,
            columns // granule, fisher.stride(0) // granule, grad.stride(0) // granule, grad.stride(1), scale,
            GRANULE=granule, **chosen,
        )  # fmt: skip


def compile_configurations() -> Iterator[Configuration]:
    """Every specialisation that the launch rules can choose."""
    for dtype in launch.DTYPES:
        operand = f"*{TRITON_TYPES[dtype]}"
        types = dict.fromkeys(POINTERS, "*fp32") | dict.fromkeys(SIZES, "i32") | dict.fromkeys(STRIDES, "i64")
        types |= {"inputs_ptr": operand, "grad_outputs_ptr": operand, "offsets_ptr": "*i64"}
        grad_types = {"fisher_ptr": "*fp32", "grad_ptr": operand, "scale": "fp32"} | dict.fromkeys(GRAD_INTEGERS, "i64")
        for granule in (launch.LOAD_BYTES // dtype.itemsize, 1):
            chosen = [
                fisher_launch.accumulate_launch((side, side), mean, 1, dtype.itemsize, granule, interpreted=False)
                for side in (768, 4096)
                for mean, _ in fisher_launch.STEP_TOKENS
            ]
            for i, constants in enumerate(chosen):
                if constants not in chosen[:i]:
                    yield Configuration(
                        fisher_accumulate_kernel, dtype, types, constants | {"GRANULE": granule},
                        wide=granule > 1, tensor_cores=dtype.itemsize == 2,
                    )  # fmt: skip
        for granule in (launch.LOAD_BYTES // torch.float32.itemsize, 1):
            constants = fisher_launch.grad_launch(2**31, granule, interpreted=False) | {"GRANULE": granule}
            yield Configuration(fisher_accumulate_grad_kernel, dtype, grad_types, constants, wide=False)
