"""From two Fisher matrices to one weight a row, d_i = sqrt(sum_j F_f / (eps + F_r))."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from loku.fila.config import EpsMode

_CHUNK_ELEMENTS = 1 << 22


@torch.no_grad()
def row_weights(
    forget: Tensor, retain: Tensor, eps: float = 1e-5, eps_mode: EpsMode = "absolute", name: str = "the module"
) -> Tensor:
    """Row weights d (out,), float32, of one module from its Fisher information on the forget and the retain set.

    d_i = sqrt(sum_j R_ij) with R = F_f / (e + F_r), and e = eps, or eps * mean(F_r) with eps_mode "relative". Sums
    are taken in float64. R is never held: two float64 copies of at most 4M elements are.

    Args:
        forget, retain: (out, in), as a `FisherAccumulator` gives them: rows are output features, whatever the layout of
            the module's weight.
        name: for messages.

    Raises:
        ValueError: the shapes differ; an entry is negative or not finite; either matrix is zero throughout, which means
            that the data never reached the module.
    """
    if forget.dim() != 2 or forget.shape != retain.shape:
        raise ValueError(
            f"the Fisher matrices of {name} must have one shape (out, in), got {tuple(forget.shape)} for the forget "
            f"set and {tuple(retain.shape)} for the retain set"
        )
    for data, fisher in (("forget", forget), ("retain", retain)):
        least, largest = map(float, fisher.aminmax())
        if not 0 <= least <= largest < math.inf:
            raise ValueError(f"the {data} Fisher of {name} has a negative, infinite or NaN entry")
        if largest == 0:
            raise ValueError(
                f"the {data} Fisher of {name} is zero everywhere: the {data} data never reached this module. "
                "Leave it out of the adapter's target_modules, or check the data and its labels"
            )
    weights = forget.new_empty(len(forget), dtype=torch.float32)
    height = max(1, _CHUNK_ELEMENTS // forget.shape[1])
    if eps_mode == "relative":
        eps = eps * sum(float(r.double().sum()) for r in retain.split(height)) / retain.numel()
    for f, r, d in zip(forget.split(height), retain.split(height), weights.split(height), strict=True):
        d.copy_(f.double().div_(r.double().add_(eps)).sum(dim=1).sqrt_())
    return weights
