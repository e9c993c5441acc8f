"""The losses of every row and, over the row itself, their gradient: memory is read once and written once.

The second sweep finds the row in the cache, of the multiprocessor (L1) or of the GPU (L2), where the first left it.
"""

from __future__ import annotations

from collections.abc import Iterator

import triton
import triton.language as tl
from torch import Tensor

from loku_kernels.backends.triton import launch
from loku_kernels.backends.triton.configurations import Configuration
from loku_kernels.backends.triton.device import read_label, row_offset, row_statistics, write_constant, write_gradient
from loku_kernels.backends.triton.formula import combine
from loku_kernels.backends.triton.losses import (
    INTEGERS,
    POINTERS,
    row_weight,
    run_sweep,
    store_row,
    sweep_configurations,
)
from loku_kernels.backends.weights import RowWeights


# Programs take rows in turn, so that their number bounds the rows that the cache has to hold. Arguments as in
# row_losses_kernel, but the logits are overwritten.
@triton.jit(do_not_specialize=INTEGERS, do_not_specialize_on_alignment=POINTERS)
def row_losses_and_gradient_kernel(
    logits_ptr, labels_ptr, ihl_weight_ptr, ce_weight_ptr, rows_ptr, index_ptr,
    N: tl.int64, T: tl.int64, V: tl.int32, stride_b: tl.int64, stride_t: tl.int64,
    ihl_stride: tl.int64, ce_stride: tl.int64, ignore_index: tl.int64,
    ihl_factor: tl.float32, ce_factor: tl.float32, scale: tl.float32, softcap: tl.float32,
    GRANULE: tl.constexpr, LANES: tl.constexpr, AHEAD: tl.constexpr, TRANSFORM: tl.constexpr,
):  # fmt: skip
    TILE: tl.constexpr = 2 * LANES * GRANULE
    for row in range(tl.program_id(0).to(tl.int64), N, tl.num_programs(0)):
        target, skip, fill = read_label(labels_ptr, row, V, ignore_index)
        row_ptr = logits_ptr + row_offset(row, T, stride_b, stride_t)
        if skip:
            store_row(rows_ptr, index_ptr, row, N, fill, fill, fill, fill, fill, fill, fill, -1)
            write_constant(row_ptr, 0, V, V, fill, GRANULE, TILE)
        else:
            ihl_weight = row_weight(ihl_weight_ptr, ihl_stride, ihl_factor, row)
            ce_weight = row_weight(ce_weight_ptr, ce_stride, ce_factor, row)
            z_t, rest, z_m, index = row_statistics(row_ptr, target, V, scale, softcap, GRANULE, LANES, AHEAD, TRANSFORM)
            loss, g_t, g_m, g_rest = combine(z_t, z_m, rest, ihl_weight, ce_weight)
            store_row(rows_ptr, index_ptr, row, N, loss, z_t, rest, z_m, g_t, g_m, g_rest, index)
            tl.debug_barrier()  # every thread has read its columns before any is overwritten
            coefficients = (target, index, z_m, g_t, g_m, g_rest)
            write_gradient(
                row_ptr, row_ptr, 0, V, V, coefficients, scale, softcap, GRANULE, TILE, TRANSFORM, "evict_first"
            )  # the cache is for rows that are still to be written


def row_losses_and_gradient_(
    logits: Tensor,
    labels: Tensor,
    weights: RowWeights,
    *,
    ignore_index: int,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """As ``reference.row_losses_and_gradient_``."""
    row = logits.shape[-1], logits.element_size(), launch.transform_name(scale, softcap)
    chosen = launch.fused_launch(*row)
    programs = launch.fused_programs(len(labels), launch.fused_rows(*row), logits.device)
    return run_sweep(
        row_losses_and_gradient_kernel, programs, chosen, logits, labels, weights, ignore_index, scale, softcap
    )


def compile_configurations() -> Iterator[Configuration]:
    """Every specialisation that the launch rules can choose."""
    yield from sweep_configurations(row_losses_and_gradient_kernel, launch.fused_launch, launch.fused_rows)
