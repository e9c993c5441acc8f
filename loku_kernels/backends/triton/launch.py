"""How the row kernels are launched: pure functions of vocabulary, dtype and alignment, with no search at run time.

A thread loads 128 bits at a time, a *granule* of 4 float32 or 8 half-precision logits, and has several such loads
on their way. The choices were measured on an H200 (docs/gpu-tuning.md): (8192, 32000), (8192, 50257) and (4096, 128256)
in float32 and bfloat16.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton

INTERPRETED: bool = triton.knobs.runtime.interpret  # as it was when the kernels were decorated
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# What is done to the logits, and by how much it lowers the number of loads ahead, as it takes registers too.
TRANSFORMS = {"none": 1, "scale": 2, "softcap": 6}

LOAD_BYTES = 16
LOADS_AHEAD = 4
WARP = 32
# Fused multiply-adds are wanted for speed, and the compiler's default differs between versions.
OPTIONS = {"enable_fp_fusion": True}

# A row has one program of 4 warps for every vocabulary: with more, what comes after the sweep costs more than it saves.
SWEEP_WARPS = 4
SWEEP_AHEAD = 8  # loads
FEWEST_LANES = 64  # each takes a column of a row's ends, of which there can be six granules


class FusedShape(NamedTuple):
    """Of the fused kernel's programs, for rows of at most so many bytes."""

    row_bytes: int
    warps: int
    ahead: int
    """Loads that a thread has on their way."""
    rows: int
    """At a time on a multiprocessor."""


# The fused kernel has to find a row again after its sweep: in the L1 cache, which holds two rows of 100 KB, or in the
# L2 cache; but also to hide one row's latencies behind others. What it does once a row, every warp does.
FUSED_SHAPES = (
    FusedShape(80 << 10, warps=8, ahead=4, rows=4),
    FusedShape(112 << 10, warps=8, ahead=6, rows=2),
    FusedShape(384 << 10, warps=16, ahead=3, rows=2),
    FusedShape(2**63, warps=32, ahead=4, rows=1),
)
SOFTCAP_WARPS, SOFTCAP_ROWS = 8, 3  # at most, as more leave it too few registers

# Columns of a row that one program of the gradient kernel writes: few, so that the programs that run at one time are
# close together in memory. (Warps and loads ahead, by the bytes of a logit.)
GRADIENT_COLUMNS = 2048
GRADIENT_SHAPE = {4: (4, 2), 2: (2, 4)}

# The losses of a batch, some thousands of numbers: as many at a time as a multiprocessor can wait for.
REDUCTION = {"LANES": 4096, "num_warps": 16} | OPTIONS

LARGEST_INTERPRETED_TILE = 65536  # the interpreter's time goes by operations, not by elements


def sweep_launch(vocabulary: int, item_bytes: int, transform: str, interpreted: bool = INTERPRETED) -> dict[str, Any]:
    """Constants and options of a kernel in which a program sweeps a row, a granule a lane at a time."""
    return _sweep(vocabulary, item_bytes, transform, SWEEP_WARPS, SWEEP_AHEAD, interpreted)


def fused_launch(vocabulary: int, item_bytes: int, transform: str, interpreted: bool = INTERPRETED) -> dict[str, Any]:
    """Constants and options of the kernel that sweeps a row and then writes over it."""
    shape = _fused_shape(vocabulary * item_bytes, transform)
    return _sweep(vocabulary, item_bytes, transform, shape.warps, shape.ahead, interpreted)


def fused_rows(vocabulary: int, item_bytes: int, transform: str) -> int:
    """How many rows the fused kernel has in hand at a time on one multiprocessor."""
    return _fused_shape(vocabulary * item_bytes, transform).rows


def fused_programs(rows: int, at_a_time: int, device: torch.device) -> int:
    """How many programs there are for so many rows, with ``at_a_time`` on a multiprocessor."""
    if device.type != "cuda":
        return rows
    return min(rows, at_a_time * torch.cuda.get_device_properties(device).multi_processor_count)


def gradient_launch(
    vocabulary: int, item_bytes: int, transform: str, same_alignment: bool, interpreted: bool = INTERPRETED
) -> dict[str, Any]:
    """Constants and options of the gradient kernel, in which a program writes COLUMNS of a row in tiles of TILE.

    Where the rows of the logits and of the output lie differently within 16 bytes, no cut suits both, and a granule is
    one column.
    """
    granule = LOAD_BYTES // item_bytes if same_alignment else 1
    if interpreted:
        tile = _interpreted_tile(vocabulary)
        return {"GRANULE": granule, "TILE": tile, "COLUMNS": tile, "TRANSFORM": transform}
    warps, loads = GRADIENT_SHAPE[item_bytes]
    tile = warps * WARP * granule * max(1, loads // TRANSFORMS[transform])
    constants = {"GRANULE": granule, "TILE": tile, "COLUMNS": GRADIENT_COLUMNS, "TRANSFORM": transform}
    return constants | {"num_warps": warps} | OPTIONS


def transform_name(scale: float, softcap: float) -> str:
    """Which of ``TRANSFORMS`` the kernel applies to the logits."""
    if softcap > 0:
        return "softcap"
    return "none" if scale == 1 else "scale"


def same_alignment(logits: torch.Tensor, out: torch.Tensor) -> bool:
    """Whether every row of the two starts at the same address modulo 16 bytes."""
    apart = [out.data_ptr() - logits.data_ptr()]
    apart += [
        (b - a) * logits.element_size()
        for size, a, b in zip(logits.shape[:2], logits.stride()[:2], out.stride()[:2], strict=True)
        if size > 1
    ]
    return all(bytes_apart % LOAD_BYTES == 0 for bytes_apart in apart)


def _fused_shape(row_bytes: int, transform: str) -> FusedShape:
    shape = next(shape for shape in FUSED_SHAPES if row_bytes <= shape.row_bytes)
    if transform == "softcap":
        shape = shape._replace(warps=min(shape.warps, SOFTCAP_WARPS), rows=min(shape.rows, SOFTCAP_ROWS))
    return shape


def _sweep(
    vocabulary: int, item_bytes: int, transform: str, warps: int, ahead: int, interpreted: bool
) -> dict[str, Any]:
    constants = {"GRANULE": LOAD_BYTES // item_bytes, "TRANSFORM": transform}
    if interpreted:
        lanes = max(FEWEST_LANES, _interpreted_tile(vocabulary) // constants["GRANULE"])
        return constants | {"LANES": lanes, "AHEAD": 1}
    ahead = -(-ahead // TRANSFORMS[transform])
    return constants | {"LANES": warps * WARP, "AHEAD": ahead, "num_warps": warps} | OPTIONS


def _interpreted_tile(vocabulary: int) -> int:
    return min(LARGEST_INTERPRETED_TILE, triton.next_power_of_2(max(vocabulary, 32)))
