"""What FILA can be told."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real
from typing import Literal, get_args

import torch

Mode = Literal["residual", "shadow"]
EpsMode = Literal["absolute", "relative"]
Granularity = Literal["sequence", "token", "batch"]


@dataclass(frozen=True)
class FilaConfig:
    """How row weights, factors and the base model come about.

    Args:
        mode: ``"residual"``, as published: the base becomes W - s B* A*, at no cost afterwards; with the adapter
            disabled, the initial part is added back, which gives the base model up to rounding. ``"shadow"``: the base
            is left alone and each forward subtracts the frozen initial factors, two thin products a layer; disabling
            the adapter gives the base model exactly, and quantised bases and several adapters are possible.
        eps: in R = F_f / (eps + F_r). The published value is 1e-5.
        eps_mode: ``"absolute"``, as published, or ``"relative"``: eps times the mean of the module's F_r, which makes R
            independent of the scale of the gradients.
        granularity: of the Fisher information, see `loku_kernels.FisherAccumulator`.
        rtol: accuracy of the weighted SVD, see `loku_kernels.weighted_svd`.
        residual_dtype: in which the residual base is kept (mode ``"residual"``); None for the weight's own. With
            float32 under a 16-bit model, a layer's product runs in float32 and its output is rounded back.
        memory_budget: bytes for Fisher matrices. Where those of all modules, on both data sets, need more, the modules
            are worked through in groups, each with a pass over the data. None: no limit, one pass.
    """

    mode: Mode = "residual"
    eps: float = 1e-5
    eps_mode: EpsMode = "absolute"
    granularity: Granularity = "sequence"
    rtol: float = 1e-4
    residual_dtype: torch.dtype | None = None
    memory_budget: int | None = None

    def __post_init__(self) -> None:
        for name, choices in (("mode", Mode), ("eps_mode", EpsMode), ("granularity", Granularity)):
            if getattr(self, name) not in get_args(choices):
                raise ValueError(f"{name} must be one of {get_args(choices)}, got {getattr(self, name)!r}")
        for name, most in (("eps", math.inf), ("rtol", 1.0)):
            value = getattr(self, name)
            if not isinstance(value, Real) or not 0 < value < most:
                raise ValueError(f"{name} must be a number above 0 and below {most:g}, got {value!r}")
        dtype = self.residual_dtype
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise ValueError(f"residual_dtype must be a floating point dtype, got {dtype!r}")
        if self.memory_budget is not None and not self.memory_budget > 0:
            raise ValueError(f"memory_budget must be a positive number of bytes, got {self.memory_budget}")
