"""What this machine's processor is good at."""

from __future__ import annotations

import functools
from pathlib import Path

import torch


def is_amd() -> bool:
    return "AuthenticAMD" in _description()


def has_avx512() -> bool:
    return torch.backends.cpu.get_cpu_capability().startswith("AVX512")


@functools.cache
def multiplies(dtype: torch.dtype) -> bool:
    """Whether oneDNN has matrix products of this 16-bit type here."""
    if not torch.backends.mkldnn.is_available():
        return False
    is_supported = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    return is_supported[dtype]()


@functools.cache
def has_slow_bfloat16() -> bool:
    """Whether bfloat16 products take longer than float32's though there are instructions for them.

    So it is with Intel's processors since Sapphire Rapids, made for AMX, where a virtual machine hides AMX: an Emerald
    Rapids multiplies bfloat16 at 160 GFLOP/s on two cores, float32 at 300.
    """
    flags = set(_description().split())
    return {"GenuineIntel", "avx512_bf16", "avx512_fp16"} <= flags and "amx_bf16" not in flags


@functools.cache
def _description() -> str:
    """Linux's, or nothing."""
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.read_text(errors="replace") if cpuinfo.exists() else ""
