"""The gradient of every row from its coefficients: the logits are read once and the gradient is written once.

An ignored row is not read. The output may be the logits.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from loku_kernels.backends.triton import launch
from loku_kernels.backends.triton.configurations import TRITON_TYPES, Configuration
from loku_kernels.backends.triton.device import read_label, row_offset, write_constant, write_gradient

POINTERS = ("logits_ptr", "labels_ptr", "index_ptr", "coefficients_ptr", "upstream_ptr", "out_ptr")
INTEGERS = (
    "T", "V", "stride_b", "stride_t", "out_stride_b", "out_stride_t", "coefficients_stride", "upstream_stride",
    "ignore_index",
)  # fmt: skip


# Several programs a row: each writes COLUMNS columns of the body, and the first the row's ends too. Neighbours in time
# are neighbours in memory.
@triton.jit(do_not_specialize=INTEGERS, do_not_specialize_on_alignment=POINTERS)
def row_gradient_kernel(
    logits_ptr,  # (B, T, V), strides (stride_b, stride_t, 1)
    labels_ptr,  # (N,) int64, N = B * T
    index_ptr,  # (N,) int64
    coefficients_ptr,  # (4, N), stride (coefficients_stride, 1): runner_up, g_target, g_runner_up, g_rest
    upstream_ptr,  # (N,), stride upstream_stride
    out_ptr,  # (B, T, V), strides (out_stride_b, out_stride_t, 1)
    T: tl.int64, V: tl.int32, stride_b: tl.int64, stride_t: tl.int64, out_stride_b: tl.int64, out_stride_t: tl.int64,
    coefficients_stride: tl.int64, upstream_stride: tl.int64,
    ignore_index: tl.int64, scale: tl.float32, softcap: tl.float32,
    COLUMNS: tl.constexpr, GRANULE: tl.constexpr, TILE: tl.constexpr, TRANSFORM: tl.constexpr,
):  # fmt: skip
    program = tl.num_programs(0) - 1 - tl.program_id(0)  # backwards: the forward pass read the last rows last
    parts = tl.cdiv(V, COLUMNS)
    row = (program // parts).to(tl.int64)
    begin = program % parts * COLUMNS
    target, skip, fill = read_label(labels_ptr, row, V, ignore_index)
    out_ptr += row_offset(row, T, out_stride_b, out_stride_t)
    if skip:
        write_constant(out_ptr, begin, begin + COLUMNS, V, fill, GRANULE, TILE)
    else:
        row_ptr = logits_ptr + row_offset(row, T, stride_b, stride_t)
        upstream = tl.load(upstream_ptr + row * upstream_stride)
        index = tl.load(index_ptr + row).to(tl.int32)
        coefficients_ptr += row
        runner_up = tl.load(coefficients_ptr)
        g_target = upstream * tl.load(coefficients_ptr + coefficients_stride)
        g_runner_up = upstream * tl.load(coefficients_ptr + 2 * coefficients_stride)
        g_rest = upstream * tl.load(coefficients_ptr + 3 * coefficients_stride)
        coefficients = (target, index, runner_up, g_target, g_runner_up, g_rest)
        end = begin + COLUMNS
        write_gradient(row_ptr, out_ptr, begin, end, V, coefficients, scale, softcap, GRANULE, TILE, TRANSFORM, "")


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
    """As ``reference.row_gradient``."""
    (N,), (_, T, V) = labels.shape, logits.shape
    transform = launch.transform_name(scale, softcap)
    chosen = launch.gradient_launch(V, logits.element_size(), transform, launch.same_alignment(logits, out))
    with torch.cuda.device_of(logits):
        row_gradient_kernel[(N * triton.cdiv(V, chosen["COLUMNS"]),)](
            logits, labels, index, coefficients, upstream, out,
            T, V, *logits.stride()[:2], *out.stride()[:2], coefficients.stride(0), upstream.stride(0),
            ignore_index, scale, softcap, **chosen,
        )  # fmt: skip


def compile_configurations() -> Iterator[Configuration]:
    """Every specialisation that the launch rules can choose."""
    for dtype in launch.DTYPES:
        logits = f"*{TRITON_TYPES[dtype]}"
        types = dict.fromkeys(POINTERS, "*fp32") | dict.fromkeys(INTEGERS, "i64") | {"V": "i32"}
        types |= {"logits_ptr": logits, "out_ptr": logits, "labels_ptr": "*i64", "index_ptr": "*i64"}
        types |= {"scale": "fp32", "softcap": "fp32"}
        for aligned in (True, False):
            for transform in launch.TRANSFORMS:
                chosen = launch.gradient_launch(50257, dtype.itemsize, transform, aligned, interpreted=False)
                yield Configuration(row_gradient_kernel, dtype, types, chosen, wide=aligned)
