"""What the launch rules can ask the compiler for, so that all of it can be compiled where there is no GPU.

Every kernel module has ``compile_configurations()``, which lists its own; ``tools/compile_kernels.py`` compiles them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton

TRITON_TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


class Configuration(NamedTuple):
    """One kernel as the launcher would specialise it."""

    kernel: triton.JITFunction
    dtype: torch.dtype
    types: dict[str, str]  # of the arguments that are not compile-time constants, in Triton's notation
    launch: dict[str, Any]  # compile-time constants, also None for a pointer, and the compiler's options
    wide: bool = True  # whether its loops are to load and store 128 bits at a time
    tensor_cores: bool = False  # whether its loops are to multiply matrices on the tensor cores
    programs: int = 1  # at least so many are to fit a multiprocessor's registers
