"""The losses of every row and, over the row itself, their gradient: memory is read once and written once.

The second sweep finds the row in the L2 cache, where the first left it.
"""

from __future__ import annotations

from collections.abc import Iterator

import triton
import triton.language as tl
from torch import Tensor

from loku_kernels.backends.triton.configurations import Configuration
from loku_kernels.backends.triton.device import read_label, row_offset, row_statistics, write_constant, write_gradient
from loku_kernels.backends.triton.formula import combine
from loku_kernels.backends.triton.losses import INTEGERS, POINTERS, launch_sweep, store_row, sweep_configurations


# One program a row. Arguments as in row_losses_kernel, but the logits are overwritten.
@triton.jit(do_not_specialize=INTEGERS, do_not_specialize_on_alignment=POINTERS)
def row_losses_and_gradient_kernel(
    logits_ptr, labels_ptr, ihl_weight_ptr, ce_weight_ptr, rows_ptr, index_ptr,
    N: tl.int64, T: tl.int64, V: tl.int32, stride_b: tl.int64, stride_t: tl.int64,
    ihl_stride: tl.int64, ce_stride: tl.int64, ignore_index: tl.int64, scale: tl.float32, softcap: tl.float32,
    GRANULE: tl.constexpr, LANES: tl.constexpr, AHEAD: tl.constexpr, TRANSFORM: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    target, skip, fill = read_label(labels_ptr, row, V, ignore_index)
    row_ptr = logits_ptr + row_offset(row, T, stride_b, stride_t)
    if skip:
        store_row(rows_ptr, index_ptr, row, N, fill, fill, fill, fill, fill, fill, fill, -1)
        write_constant(row_ptr, 0, V, V, fill, GRANULE, 2 * LANES)
    else:
        z_t, rest, z_m, index = row_statistics(row_ptr, target, V, scale, softcap, GRANULE, LANES, AHEAD, TRANSFORM)
        ihl_weight = tl.load(ihl_weight_ptr + row * ihl_stride)
        ce_weight = tl.load(ce_weight_ptr + row * ce_stride)
        loss, g_t, g_m, g_rest = combine(z_t, z_m, rest, ihl_weight, ce_weight)
        store_row(rows_ptr, index_ptr, row, N, loss, z_t, rest, z_m, g_t, g_m, g_rest, index)
        tl.debug_barrier()  # every thread has read its columns before any is overwritten
        coefficients = (target, index, z_m, g_t, g_m, g_rest)
        write_gradient(row_ptr, row_ptr, 0, V, V, coefficients, scale, softcap, GRANULE, 2 * LANES, TRANSFORM)


def row_losses_and_gradient_(
    logits: Tensor,
    labels: Tensor,
    ihl_weight: Tensor,
    ce_weight: Tensor,
    *,
    ignore_index: int,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """As ``reference.row_losses_and_gradient_``."""
    return launch_sweep(
        row_losses_and_gradient_kernel, logits, labels, ihl_weight, ce_weight, ignore_index, scale, softcap
    )


def compile_configurations() -> Iterator[Configuration]:
    """Every specialisation that the launch rules can choose."""
    yield from sweep_configurations(row_losses_and_gradient_kernel)
