"""Matrix products by the fastest route that torch has for them.

torch.mm hands float32 to MKL, which on AMD processors is not always the best torch has; oneDNN is as accurate. With
AVX-512, which MKL does not use there, it reaches half of what oneDNN reaches. With AVX2 alone it is as good or better,
but for inputs @ weight^T: 160 x 768 x 50257 took 185 ms on a Zen 3, and oneDNN 100. The rules are fixed, not timed at
run time: results must not hang on the load.

Where a processor has no instructions for a 16-bit type, torch's own loops multiply it at 0.4 to 20 GFLOP/s, and at 100
in float32 (Zen 3, 2 cores). The operands are therefore widened, a block at a time; also where it has slow ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from loku_kernels import processor

# oneDNN lays its operands out anew for every product, which only products with some height repay: 4096 x 4096 times
# 32 columns takes 2.7 ms against MKL's 7.5.
_ONEDNN_MIN_SIDE = 16
# From so many rows on, MKL takes 0.87 to 1 times as long for the transpose of a product, and is as accurate; with fewer
# rows its error is ten times as large.
_TRANSPOSE_MIN_ROWS = 16
# Widening costs as much as slow bfloat16 products of so many rows.
_WIDENED_MIN_ROWS = 64
# cuBLAS multiplies matrices slowly whose rows do not start at multiples of 16 bytes, as those of 50257 logits do not.
_CUDA_ROW_BYTES = 16
# Floats in the widened blocks of one step: small beside a chunk of logits, large enough for the product's full speed.
_WIDENED_ELEMENTS = 2 << 20


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """A block whose products are formed in the dtypes that they are given."""
    return torch.autocast(device.type, enabled=False) if has_autocast(device) else nullcontext()


def has_autocast(device: torch.device) -> bool:
    """Whether torch has such a thing there; torch.amp.is_autocast_available cannot be compiled before torch 2.13."""
    return device.type != "meta"


def linear(inputs: Tensor, weight: Tensor, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """inputs (N, D) @ weight (V, D)^T + bias (V,) -> (N, V), written into ``out`` where the fastest route can."""
    if is_widened(inputs):
        return _linear_in_float32(inputs, weight, bias, out)
    if processor.is_amd() and _onednn_serves(inputs, weight):
        return torch.ops.mkldnn._linear_pointwise(inputs, weight, bias, "none", [], "")
    if bias is None:
        return torch.mm(inputs, weight.t(), out=out)
    return torch.addmm(bias, inputs, weight.t(), out=out)


def mm(a: Tensor, b: Tensor) -> Tensor:
    """a (N, K) @ b (K, M) -> (N, M)."""
    if is_widened(a):
        return _mm_in_float32(a, b)
    if a.device.type == "cpu" and not processor.has_avx512() and len(a) >= _TRANSPOSE_MIN_ROWS:
        return torch.mm(b.t(), a.t()).t()
    return linear(a, b.t())


def missing_rows(weight: Tensor) -> int:
    """How many rows more of weight (V, D) would make rows of V products start where cuBLAS wants them."""
    return -len(weight) % (_CUDA_ROW_BYTES // weight.element_size()) if weight.is_cuda else 0


def add_outer_(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total (V, D) += a (N, V)^T @ b (N, D), formed and summed in total's dtype (float32 for 16-bit a and b)."""
    if a.dtype == total.dtype:
        total.addmm_(a.t(), b)
    elif a.is_cuda:
        total += torch.mm(a.t(), b, out_dtype=total.dtype)
    else:
        wide = b.to(total.dtype)
        for block, (columns,) in _in_float32(a.t(), beside=b.shape[1]):
            total[block].addmm_(columns, wide)


def is_widened(a: Tensor) -> bool:
    """Whether products a @ b are formed in float32 because the processor has none of a's dtype, or slow ones."""
    if a.device.type != "cpu" or a.dtype not in (torch.bfloat16, torch.float16):
        return False
    slow = a.dtype == torch.bfloat16 and processor.has_slow_bfloat16() and len(a) >= _WIDENED_MIN_ROWS
    return slow or not processor.multiplies(a.dtype)


def _linear_in_float32(inputs: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None) -> Tensor:
    wide = inputs.float()
    out = inputs.new_empty(inputs.shape[0], weight.shape[0]) if out is None else out
    for block, (wide_weight,) in _in_float32(weight, beside=len(inputs)):
        out[:, block] = linear(wide, wide_weight, None if bias is None else bias[block].float())
    return out


def _mm_in_float32(a: Tensor, b: Tensor) -> Tensor:
    total = a.new_zeros(a.shape[0], b.shape[1], dtype=torch.float32)
    for _, (columns, rows) in _in_float32(a.t(), b):
        total.addmm_(columns.t(), rows)
    return total.to(a.dtype)


def _in_float32(*matrices: Tensor, beside: int = 0) -> Iterator[tuple[slice, list[Tensor]]]:
    """The rows of matrices of one height, a block at a time, widened into memory that the next block is written over.

    ``beside``: floats that the caller holds for each row. Fresh memory for every block would tear the C library's heap
    into holes, by half as much as is in use.
    """
    height = len(matrices[0])
    width = beside + sum(matrix.shape[1] for matrix in matrices)
    step = min(height, max(1, _WIDENED_ELEMENTS // max(1, width)))
    wide = [torch.empty_like(matrix[:step], dtype=torch.float32) for matrix in matrices]
    for start in range(0, height, step):
        block = slice(start, min(start + step, height))
        yield block, [to[: block.stop - start].copy_(matrix[block]) for to, matrix in zip(wide, matrices, strict=True)]


def _onednn_serves(a: Tensor, b: Tensor) -> bool:
    return (
        a.dtype == b.dtype == torch.float32
        and a.device.type == "cpu"
        and min(*a.shape, *b.shape) >= _ONEDNN_MIN_SIDE
        and torch.backends.mkl.is_available()
        and torch.backends.mkldnn.is_available()
    )
