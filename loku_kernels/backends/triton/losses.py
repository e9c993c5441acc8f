"""Statistics, loss and gradient coefficients of every row: the logits are read once, and 7 floats a row written."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from loku_kernels.backends import formulas
from loku_kernels.backends.triton import launch
from loku_kernels.backends.triton.configurations import TRITON_TYPES, Configuration
from loku_kernels.backends.triton.device import read_label, row_offset, row_statistics
from loku_kernels.backends.triton.formula import combine
from loku_kernels.backends.weights import RowWeights

LOSS = tl.constexpr(formulas.LOSS)
TARGET = tl.constexpr(formulas.TARGET)
REST = tl.constexpr(formulas.REST)
RUNNER_UP = tl.constexpr(formulas.RUNNER_UP)
G_TARGET = tl.constexpr(formulas.G_TARGET)
G_RUNNER_UP = tl.constexpr(formulas.G_RUNNER_UP)
G_REST = tl.constexpr(formulas.G_REST)

WEIGHTS = ("ihl_weight_ptr", "ce_weight_ptr")
POINTERS = ("logits_ptr", "labels_ptr", *WEIGHTS, "rows_ptr", "index_ptr")
INTEGERS = ("N", "T", "V", "stride_b", "stride_t", "ihl_stride", "ce_stride", "ignore_index")
FLOATS = ("ihl_factor", "ce_factor", "scale", "softcap")


@triton.jit
def store_row(rows_ptr, index_ptr, row, N, loss, target, rest, runner_up, g_target, g_runner_up, g_rest, index):
    """One column of the (7, N) table, and the runner-up's index."""
    entry = rows_ptr + row
    tl.store(entry + LOSS * N, loss)
    tl.store(entry + TARGET * N, target)
    tl.store(entry + REST * N, rest)
    tl.store(entry + RUNNER_UP * N, runner_up)
    tl.store(entry + G_TARGET * N, g_target)
    tl.store(entry + G_RUNNER_UP * N, g_runner_up)
    tl.store(entry + G_REST * N, g_rest)
    tl.store(index_ptr + row, index)


@triton.jit
def row_weight(weight_ptr, stride, factor, row):
    """The factor, times the row's entry where there is a tensor."""
    weight = factor
    if weight_ptr is not None:
        weight *= tl.load(weight_ptr + row * stride)
    return weight


# One program a row. The alignment is found in the kernel, row by row, so one binary serves every address and every V.
@triton.jit(do_not_specialize=INTEGERS, do_not_specialize_on_alignment=POINTERS)
def row_losses_kernel(
    logits_ptr,  # (B, T, V), strides (stride_b, stride_t, 1)
    labels_ptr,  # (N,) int64, N = B * T
    ihl_weight_ptr,  # (N,), stride ihl_stride, or None
    ce_weight_ptr,  # (N,), stride ce_stride, or None
    rows_ptr,  # (7, N)
    index_ptr,  # (N,) int64
    N: tl.int64, T: tl.int64, V: tl.int32, stride_b: tl.int64, stride_t: tl.int64,
    ihl_stride: tl.int64, ce_stride: tl.int64, ignore_index: tl.int64,
    ihl_factor: tl.float32, ce_factor: tl.float32, scale: tl.float32, softcap: tl.float32,
    GRANULE: tl.constexpr, LANES: tl.constexpr, AHEAD: tl.constexpr, TRANSFORM: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    target, skip, fill = read_label(labels_ptr, row, V, ignore_index)
    if skip:
        store_row(rows_ptr, index_ptr, row, N, fill, fill, fill, fill, fill, fill, fill, -1)
    else:
        row_ptr = logits_ptr + row_offset(row, T, stride_b, stride_t)
        z_t, rest, z_m, index = row_statistics(row_ptr, target, V, scale, softcap, GRANULE, LANES, AHEAD, TRANSFORM)
        # Not before: the sweep has no registers to spare.
        ihl_weight = row_weight(ihl_weight_ptr, ihl_stride, ihl_factor, row)
        ce_weight = row_weight(ce_weight_ptr, ce_stride, ce_factor, row)
        loss, g_t, g_m, g_rest = combine(z_t, z_m, rest, ihl_weight, ce_weight)
        store_row(rows_ptr, index_ptr, row, N, loss, z_t, rest, z_m, g_t, g_m, g_rest, index)


def row_losses(
    logits: Tensor,
    labels: Tensor,
    weights: RowWeights,
    *,
    ignore_index: int,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """As ``reference.row_losses``."""
    chosen = launch.sweep_launch(logits.shape[-1], logits.element_size(), launch.transform_name(scale, softcap))
    return run_sweep(row_losses_kernel, len(labels), chosen, logits, labels, weights, ignore_index, scale, softcap)


def run_sweep(
    kernel: triton.JITFunction,
    programs: int,
    chosen: dict[str, Any],
    logits: Tensor,
    labels: Tensor,
    weights: RowWeights,
    ignore_index: int,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """Run a kernel in which a program sweeps a row at a time, and return the table and the index."""
    (N,), (_, T, V) = labels.shape, logits.shape
    rows = logits.new_empty(formulas.ROW_FIELDS, N, dtype=torch.float32)
    index = torch.empty_like(labels)
    strides = (0 if weight is None else weight.stride(0) for weight in (weights.ihl, weights.ce))
    with torch.cuda.device_of(logits):
        kernel[(programs,)](
            logits, labels, weights.ihl, weights.ce, rows, index,
            N, T, V, *logits.stride()[:2], *strides,
            ignore_index, weights.ihl_factor, weights.ce_factor, scale, softcap, **chosen,
        )  # fmt: skip
    return rows, index


def sweep_configurations(
    kernel: triton.JITFunction,
    rule: Callable[..., dict[str, Any]],
    programs: Callable[[int, int, str], int] | None = None,
) -> Iterator[Configuration]:
    """All that ``run_sweep`` can ask of ``kernel`` by a launch rule, with both weights in tensors and with both as
    numbers; one of each lies between the two.

    ``programs``, of vocabulary, item size and transform, is how many a multiprocessor has to have room for.
    """
    for dtype in launch.DTYPES:
        types = dict.fromkeys(POINTERS, "*fp32") | dict.fromkeys(INTEGERS, "i64") | dict.fromkeys(FLOATS, "fp32")
        types |= {"logits_ptr": f"*{TRITON_TYPES[dtype]}", "labels_ptr": "*i64", "index_ptr": "*i64", "V": "i32"}
        without = {name: type for name, type in types.items() if name not in WEIGHTS}
        for transform in launch.TRANSFORMS:
            found: list[dict[str, Any]] = []
            for vocabulary in (1000, 25000, 50257, 70000, 1 << 20):  # rows of every length that the rules tell apart
                chosen = rule(vocabulary, dtype.itemsize, transform, interpreted=False)
                if chosen not in found:
                    found.append(chosen)
                    at_once = programs(vocabulary, dtype.itemsize, transform) if programs else 1
                    yield Configuration(kernel, dtype, types, chosen, programs=at_once)
                    yield Configuration(kernel, dtype, without, chosen | dict.fromkeys(WEIGHTS), programs=at_once)


def compile_configurations() -> Iterator[Configuration]:
    """Every specialisation that the launch rules can choose."""
    yield from sweep_configurations(row_losses_kernel, launch.sweep_launch)
