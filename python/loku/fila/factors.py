"""The closed form: row weights and W to A*, B* and the residual."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from loku_kernels.svd import weighted_svd


class Factors(NamedTuple):
    """s * B @ A is the part of W that an adapter starts from."""

    A: Tensor  # (r, in)
    B: Tensor  # (out, r)


@torch.no_grad()
def fila_factors(
    weight: Tensor, row_weight: Tensor, rank: int, scaling: float, dtype: torch.dtype, rtol: float = 1e-4
) -> Factors:
    """A* = sqrt(S/s) V^T and B* = diag(1/d) U sqrt(S/s) of the best rank-r approximation U S V^T of diag(d) W.

    Then s B* A* = W V V^T in the rows with d > 0: each row's projection, never longer than the row itself. A row with
    d = 0 carries no weight; B* is 0 there and the row stays in the base. Where diag(d) W has a rank k < r, the last
    r - k rows of A* and columns of B* are 0.

    Args:
        weight: (out, in), floating point.
        row_weight: (out,), finite and at least 0, not 0 throughout.
        scaling: s of the adapter, positive: lora_alpha / r, or lora_alpha / sqrt(r) with rank-stabilised LoRA.
        dtype: of the factors, that of the adapter's parameters.

    Raises:
        ValueError: what `weighted_svd` raises; scaling is not positive; row_weight is 0 throughout; a factor
            overflows in ``dtype``.
    """
    if not scaling > 0:
        raise ValueError(f"scaling must be positive, got {scaling} (lora_alpha must be)")
    if not bool(row_weight.any()):
        raise ValueError("row_weight is 0 throughout, so no direction matters more than another")
    row_weight = row_weight.to(weight.device)
    _, S, Vh, _ = weighted_svd(weight, row_weight, rank, rtol=rtol)
    root = (S.double() / scaling).sqrt()
    A = root[:, None] * Vh.double()
    # diag(1/d) U S = W V, which is as accurate in rows of small weight as in the others; U / d would not be.
    projected = (weight.to(Vh.dtype) @ Vh.T).double()
    B = torch.where(row_weight[:, None] > 0, projected * torch.where(root > 0, 1 / (scaling * root), 0.0), 0.0)
    factors = Factors(A.to(dtype), B.to(dtype))
    if not all(bool(torch.isfinite(factor).all()) for factor in factors):
        raise ValueError(f"a factor overflows in {dtype}; keep the adapter in float32 (autocast_adapter_dtype=True)")
    return factors


@torch.no_grad()
def residual_weight(weight: Tensor, factors: Factors, scaling: float, dtype: torch.dtype) -> Tensor:
    """W - s B A (out, in), from the factors as they are stored, in float32 or better, rounded once to ``dtype``."""
    wide = torch.float64 if torch.float64 in (weight.dtype, dtype) else torch.float32
    return torch.addmm(weight.to(wide), factors.B.to(wide), factors.A.to(wide), alpha=-scaling).to(dtype)
