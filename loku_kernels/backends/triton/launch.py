"""How the row kernels are launched: pure functions of vocabulary, dtype and alignment, with no search at run time.

A thread loads 128 bits at a time, a *granule* of 4 float32 or 8 half-precision logits, and has 4 such loads on their
way: 64 bytes a thread, 64 KiB a multiprocessor at half occupancy, where 4.8 TB/s at a latency of 0.8 us needs 29 KiB on
each of 132. The sweep keeps three registers for each column of a tile (m, R, where): 12 a thread in float32, 24 in half
precision, beside 16 for the loads. As compiled that is 48 and 64 registers on sm_90: half occupancy or better.

A row has one program of 4 warps, for every vocabulary: a row of 32000 gives each thread 30 or more tiles, against which
the reduction over the lanes at the end is small. With 8 warps the compiler spills in half precision: it then aims at 80
registers, of which the sweep with a soft cap needs a few more.
"""

from __future__ import annotations

from typing import Any

import torch
import triton

INTERPRETED: bool = triton.knobs.runtime.interpret  # as it was when the kernels were decorated
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TRANSFORMS = ("none", "scale", "softcap")

LOAD_BYTES = 16
LOADS_AHEAD = 4
WARP = 32
# Fused multiply-adds are wanted for speed, and the compiler's default differs between versions.
OPTIONS = {"enable_fp_fusion": True}

SWEEP_WARPS = 4
FUSED_ROWS = 4
FEWEST_LANES = 64  # each takes a column of a row's ends, of which there can be six granules

# Columns of a row that one program of the gradient kernel writes: enough to hide the loads of its row's coefficients,
# few enough that a handful of rows fills a GPU.
GRADIENT_COLUMNS = 16384
GRADIENT_WARPS = 4

LARGEST_INTERPRETED_TILE = 65536  # the interpreter's time goes by operations, not by elements


def sweep_launch(vocabulary: int, item_bytes: int, interpreted: bool = INTERPRETED) -> dict[str, Any]:
    """Constants and options of a kernel in which a program sweeps a row, a granule a lane at a time."""
    granule = LOAD_BYTES // item_bytes
    if interpreted:
        lanes = max(FEWEST_LANES, _interpreted_tile(vocabulary) // granule)
        return {"GRANULE": granule, "LANES": lanes, "AHEAD": 1}
    return {"GRANULE": granule, "LANES": SWEEP_WARPS * WARP, "AHEAD": LOADS_AHEAD, "num_warps": SWEEP_WARPS} | OPTIONS


def gradient_launch(
    vocabulary: int, item_bytes: int, same_alignment: bool, interpreted: bool = INTERPRETED
) -> dict[str, Any]:
    """Constants and options of the gradient kernel, in which a program writes COLUMNS of a row in tiles of TILE.

    Where the rows of the logits and of the output lie differently within 16 bytes, no cut suits both, and a granule is
    one column.
    """
    granule = LOAD_BYTES // item_bytes if same_alignment else 1
    if interpreted:
        tile = _interpreted_tile(vocabulary)
        return {"GRANULE": granule, "TILE": tile, "COLUMNS": tile}
    tile = GRADIENT_WARPS * WARP * granule * LOADS_AHEAD
    return {"GRANULE": granule, "TILE": tile, "COLUMNS": GRADIENT_COLUMNS, "num_warps": GRADIENT_WARPS} | OPTIONS


def fused_programs(rows: int, row_bytes: int, device: torch.device) -> int:
    """How many rows the fused kernel has in hand at a time, at most FUSED_ROWS a multiprocessor."""
    if device.type != "cuda":
        return rows
    return min(rows, FUSED_ROWS * torch.cuda.get_device_properties(device).multi_processor_count)


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


def _interpreted_tile(vocabulary: int) -> int:
    return min(LARGEST_INTERPRETED_TILE, triton.next_power_of_2(max(vocabulary, 32)))
