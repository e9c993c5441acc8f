"""Matrix products by the fastest route that torch has for them.

torch.mm hands float32 to MKL, which on AMD processors is not always the best torch has; oneDNN is as accurate. With
AVX-512, which MKL does not use there, it reaches half of what oneDNN reaches. With AVX2 alone it is as good or better,
but for inputs @ weight^T: 160 x 768 x 50257 took 185 ms on a Zen 3, and oneDNN 100. The rules are fixed, not timed at
run time: results must not hang on the load.
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import Tensor

# oneDNN lays its operands out anew for every product, which only products with some height repay: 4096 x 4096 times
# 32 columns takes 2.7 ms against MKL's 7.5.
_ONEDNN_MIN_SIDE = 16


def linear(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """inputs (N, D) @ weight (V, D)^T + bias (V,) -> (N, V)."""
    if _is_amd() and _onednn_serves(inputs, weight):
        return torch.ops.mkldnn._linear_pointwise(inputs, weight, bias, "none", [], "")
    return torch.nn.functional.linear(inputs, weight, bias)


def mm(a: Tensor, b: Tensor) -> Tensor:
    """a (N, K) @ b (K, M) -> (N, M)."""
    return linear(a, b.t()) if _has_avx512() else torch.mm(a, b)


def add_outer_(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total (V, D) += a (N, V)^T @ b (N, D), formed and summed in total's dtype (float32 for 16-bit a and b)."""
    if a.dtype == total.dtype:
        total.addmm_(a.t(), b)
    elif a.is_cuda:
        total += torch.mm(a.t(), b, out_dtype=total.dtype)
    else:
        total.addmm_(a.t().to(total.dtype), b.to(total.dtype))


def _onednn_serves(a: Tensor, b: Tensor) -> bool:
    return (
        a.dtype == b.dtype == torch.float32
        and a.device.type == "cpu"
        and min(*a.shape, *b.shape) >= _ONEDNN_MIN_SIDE
        and torch.backends.mkl.is_available()
        and torch.backends.mkldnn.is_available()
    )


@functools.cache
def _is_amd() -> bool:
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.exists() and "AuthenticAMD" in cpuinfo.read_text(errors="replace")


def _has_avx512() -> bool:
    return torch.backends.cpu.get_cpu_capability().startswith("AVX512")
