"""Matrix products by the fastest route that torch has for them.

torch.mm hands float32 to MKL, which uses no AVX-512 on AMD processors that have it: there it reaches half of what
oneDNN reaches with the same float32 accuracy. Everywhere else, on AMD processors with AVX2 alone too, torch.mm is the
right choice (`bench/test_linear_losses.py` shows both). A rule, not a timing at run time: results must not hang on load.
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
    if _use_onednn(inputs, weight):
        return torch.ops.mkldnn._linear_pointwise(inputs, weight, bias, "none", [], "")
    return torch.nn.functional.linear(inputs, weight, bias)


def mm(a: Tensor, b: Tensor) -> Tensor:
    """a (N, K) @ b (K, M) -> (N, M)."""
    return linear(a, b.t())


def add_outer_(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total (V, D) += a (N, V)^T @ b (N, D), formed and summed in total's dtype (float32 for 16-bit a and b)."""
    if a.dtype == total.dtype:
        total.addmm_(a.t(), b)
    elif a.is_cuda:
        total += torch.mm(a.t(), b, out_dtype=total.dtype)
    else:
        total.addmm_(a.t().to(total.dtype), b.to(total.dtype))


def _use_onednn(inputs: Tensor, weight: Tensor) -> bool:
    return (
        inputs.dtype == weight.dtype == torch.float32
        and inputs.device.type == "cpu"
        and min(*inputs.shape, *weight.shape) >= _ONEDNN_MIN_SIDE
        and _mkl_is_slow_here()
    )


@functools.cache
def _mkl_is_slow_here() -> bool:
    cpuinfo = Path("/proc/cpuinfo")
    return (
        torch.backends.mkl.is_available()
        and torch.backends.mkldnn.is_available()
        and torch.backends.cpu.get_cpu_capability().startswith("AVX512")
        and cpuinfo.exists()
        and "AuthenticAMD" in cpuinfo.read_text(errors="replace")
    )
