"""How the Fisher kernels are launched: pure functions of sizes, dtype and alignment, with no search at run time.

Chosen by counting; what it takes on an H200 is in docs/gpu-tuning.md. In a clock, a multiprocessor of an H200
multiplies 2048 pairs of half-precision numbers and its float32 units finish 128 operations.

- A program holds two float32 tiles, the gradient and the sum of squares. 128 x 128 on 8 warps is 128 registers a thread
  for both, and the largest tile that fits. A token of half precision is 512 bytes to load and 8 clocks to multiply; the
  next smaller tile would load 96 bytes a clock, more than the L2 cache has for each multiprocessor.
- Squaring is 2 operations an element, 256 clocks a sequence, as long as multiplying 32 tokens.
- A step of 32 tokens multiplies for 256 clocks, in which the rest of a step can hide. Of sequences of 20 to 120 tokens
  it multiplies 1.23 times the tokens there are; 16 tokens 1.11 times, in twice as many steps.
- float32 products run on the float32 units, 128 clocks a token: short steps, since only waste counts there.
- A matrix of few tiles would leave multiprocessors idle, and odd sizes take an address and a mask for every element,
  which leaves no registers for a large tile: both have small tiles, 4 for each large one.
"""

from __future__ import annotations

from typing import Any

import torch
import triton

from loku_kernels.backends.triton.launch import (
    INTERPRETED,
    LARGEST_INTERPRETED_TILE,
    LOAD_BYTES,
    LOADS_AHEAD,
    OPTIONS,
    WARP,
)

# Tokens a step in half precision, by the mean length of a sequence, up to and including.
STEP_TOKENS = ((32, 16), (2**31, 32))
LARGE = {"BLOCK_OUT": 128, "BLOCK_IN": 128, "GROUP": 8, "num_warps": 8, "num_stages": 4} | OPTIONS
SMALL = {"BLOCK_OUT": 64, "BLOCK_IN": 64, "GROUP": 16, "num_warps": 4, "num_stages": 4} | OPTIONS
FEW_TILES = 256  # two for each multiprocessor of the larger GPUs
INTERPRETED_TILE = {"BLOCK_OUT": 128, "BLOCK_IN": 128, "BLOCK_TOKENS": 16, "GROUP": 2}

GRAD_WARPS = 4


def accumulate_launch(
    shape: tuple[int, int],
    tokens: int,
    sequences: int,
    item_bytes: int,
    granule: int,
    interpreted: bool = INTERPRETED,
) -> dict[str, Any]:
    """Constants and options of the kernel in which one program has a tile of the Fisher matrix for all tokens."""
    if interpreted:
        return dict(INTERPRETED_TILE)
    tiles = triton.cdiv(shape[0], LARGE["BLOCK_OUT"]) * triton.cdiv(shape[1], LARGE["BLOCK_IN"])
    tile = SMALL if granule == 1 or tiles < FEW_TILES else LARGE
    mean = tokens / max(sequences, 1)
    step = 16 if item_bytes == 4 else next(step for limit, step in STEP_TOKENS if mean <= limit)
    return {"BLOCK_TOKENS": step} | tile


def grad_launch(columns: int, granule: int, interpreted: bool = INTERPRETED) -> dict[str, Any]:
    """Constants and options of the elementwise kernel, in which a program has COLUMNS columns of a row."""
    if interpreted:
        return {"COLUMNS": min(LARGEST_INTERPRETED_TILE, triton.next_power_of_2(columns))}
    return {"COLUMNS": GRAD_WARPS * WARP * granule * LOADS_AHEAD, "num_warps": GRAD_WARPS} | OPTIONS


def granule(item_bytes: int, *matrices: torch.Tensor) -> int:
    """Elements that are loaded at a time: 16 bytes of the operands if all rows of all matrices allow it, else 1."""
    elements = LOAD_BYTES // item_bytes
    aligned = all(
        matrix.data_ptr() % LOAD_BYTES == 0
        and matrix.stride(1) == 1
        and matrix.shape[1] % elements == 0
        and matrix.stride(0) % elements == 0
        for matrix in matrices
    )
    return elements if aligned else 1
