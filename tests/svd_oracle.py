"""Matrices of known spectra, and the contract of weighted_svd against torch.linalg.svdvals in float64."""

from __future__ import annotations

import math

import pytest
import torch

from loku_kernels.svd import WeightedSVD

FLOAT32_FLOOR = 8 * 2.0**-23
CASES = (
    "flat",
    "power law",
    "steep",
    "clustered",
    "low rank and noise",
    "eight decades",
    "zero rows",
    "eight decades and zero rows",
)


def with_spectrum(values: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """A rows x columns matrix with the given singular values, in float64."""
    generator = torch.Generator().manual_seed(1)
    left = torch.linalg.qr(torch.randn(rows, len(values), dtype=torch.float64, generator=generator))[0]
    right = torch.linalg.qr(torch.randn(columns, len(values), dtype=torch.float64, generator=generator))[0]
    return (left * values) @ right.T


def case(name: str, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """weight and row_weight in float64."""
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(rows, columns, dtype=torch.float64, generator=generator)
    row_weight = 0.5 + torch.rand(rows, dtype=torch.float64, generator=generator)
    order = torch.arange(1, min(rows, columns) + 1, dtype=torch.float64)
    if name == "power law":
        weight = with_spectrum(order**-0.7, rows, columns)
    elif name == "steep":
        weight = with_spectrum(order**-4, rows, columns)
    elif name == "clustered":
        weight = with_spectrum(1.0 - 0.3 * (order > 6) - 0.3 * (order > 24), rows, columns)
        row_weight = torch.ones_like(row_weight)
    elif name == "low rank and noise":
        weight = with_spectrum((order <= 5).double() / order + 1e-3, rows, columns)
    elif name == "eight decades":
        row_weight = 10 ** (-8 * torch.rand(rows, dtype=torch.float64, generator=generator))
    elif name in ("zero rows", "eight decades and zero rows"):
        if name.startswith("eight"):
            row_weight = 10 ** (-8 * torch.rand(rows, dtype=torch.float64, generator=generator))
        row_weight[torch.rand(rows, generator=generator) < 0.6] = 0
    return weight, row_weight


def optimum(weight: torch.Tensor, row_weight: torch.Tensor, rank: int) -> tuple[float, float]:
    """The norm of D W and the least residual of the rank."""
    values = torch.linalg.svdvals(row_weight.double()[:, None] * weight.double())
    return float(values.norm()), float(values[rank:].norm())


def assert_contract(got: WeightedSVD, weight: torch.Tensor, row_weight: torch.Tensor, rank: int, rtol=1e-4, floor=None):
    norm, least = optimum(weight, row_weight, rank)
    floor = FLOAT32_FLOOR if floor is None else floor
    a = row_weight.double()[:, None] * weight.double()
    product = (got.U.double() * got.S.double()) @ got.Vh.double()
    residual = float((a - product).norm())
    assert residual <= math.hypot((1 + rtol) * least, floor * norm)
    assert residual <= math.hypot(least + 0.01 * (norm - least), floor * norm)
    if norm > 0:
        assert float(got.residual) == pytest.approx(residual / norm, rel=1e-5, abs=FLOAT32_FLOOR)
    assert_orthonormal(got)
    assert (got.S >= 0).all() and (got.S.diff() <= 0).all()


def assert_orthonormal(got: WeightedSVD):
    rank = got.S.shape[-1]
    identity = torch.eye(rank, dtype=torch.float64)
    u, vh = got.U.double(), got.Vh.double()
    assert float((u.mT @ u - identity).abs().max()) < 1e-5
    assert float((vh @ vh.mT - identity).abs().max()) < 1e-5
