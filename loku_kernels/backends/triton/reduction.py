"""The sum or mean of the rows' losses, in one launch where torch takes six."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from loku_kernels.backends.triton import launch
from loku_kernels.backends.triton.configurations import Configuration

POINTERS = ("losses_ptr", "labels_ptr", "value_ptr", "factor_ptr")
INTEGERS = ("N", "ignore_index")


# One program, whose lanes add up in a fixed order: results are the same bits every time.
@triton.jit(do_not_specialize=INTEGERS, do_not_specialize_on_alignment=POINTERS)
def reduce_losses_kernel(
    losses_ptr,  # (N,)
    labels_ptr,  # (N,) int64
    value_ptr,
    factor_ptr,
    N: tl.int64, ignore_index: tl.int64, LANES: tl.constexpr, MEAN: tl.constexpr,
):  # fmt: skip
    sums = tl.zeros((LANES,), tl.float32)
    counts = tl.zeros((LANES,), tl.int64)
    for first in range(0, N, LANES):
        row = first + tl.arange(0, LANES)
        there = row < N
        sums += tl.load(losses_ptr + row, there, 0.0)
        if MEAN:
            counts += (tl.load(labels_ptr + row, there, ignore_index) != ignore_index).to(tl.int64)
    total = tl.sum(sums, 0)
    if MEAN:
        counted = tl.maximum(tl.sum(counts, 0), 1).to(tl.float32)
        tl.store(value_ptr, total / counted)
        tl.store(factor_ptr, 1.0 / counted)
    else:
        tl.store(value_ptr, total)
        tl.store(factor_ptr, 1.0)


def reduce_losses(losses: Tensor, labels: Tensor, *, ignore_index: int, mean: bool) -> tuple[Tensor, Tensor]:
    """As ``reference.reduce_losses``."""
    value, factor = losses.new_empty(()), losses.new_empty(())
    with torch.cuda.device_of(losses):
        reduce_losses_kernel[(1,)](
            losses, labels, value, factor, len(labels), ignore_index, MEAN=mean, **launch.REDUCTION
        )
    return value, factor


def compile_configurations() -> Iterator[Configuration]:
    """Every specialisation that can be launched."""
    types = dict.fromkeys(POINTERS, "*fp32") | dict.fromkeys(INTEGERS, "i64") | {"labels_ptr": "*i64"}
    for mean in (False, True):
        chosen = launch.REDUCTION | {"MEAN": mean}
        yield Configuration(reduce_losses_kernel, torch.float32, types, chosen, wide=False)
