"""weighted_svd beside torch.linalg.svd and torch.svd_lowrank: time, and what the residual has above the optimum.

`excess` is that relative to the optimum; `lost` its share of what rank 0's residual has above the optimum.
The full SVD of a matrix is computed once, timed, and serves as the optimum; the others run in turns.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from bench.harness import Candidate, Measurement
from loku.measuring import MIB, peak_memory, timer
from loku_kernels.svd import weighted_svd

SHAPES = [(768, 3072), (2048, 8192), (4096, 4096), (4096, 11008)]
QUICK_SHAPES = [(96, 160)]


class Problem(NamedTuple):
    weight: Tensor
    row_weight: Tensor
    scaled: Tensor
    values: Tensor
    whole: Measurement
    """Of torch.linalg.svd, once."""


@functools.lru_cache(maxsize=1)
def problem(rows: int, columns: int, spectrum: str) -> Problem:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, columns, generator=generator)
    if spectrum == "power law":
        weight *= torch.arange(1, columns + 1) ** -0.6
    row_weight = 0.5 + torch.rand(rows, generator=generator)
    scaled = row_weight[:, None] * weight
    whole = Measurement("", "torch.linalg.svd", "peer", weight.nbytes, "GB/s")
    values: list[Tensor] = []

    def decompose() -> None:
        values.append(torch.linalg.svd(scaled, full_matrices=False)[1].double())

    time = timer(torch.device("cpu"))
    whole.peak_mib = peak_memory(lambda: whole.times_ms.append(time(decompose)), torch.device("cpu")) / MIB
    return Problem(weight, row_weight, scaled, values[0], whole)


def lowrank(p: Problem, rank: int, **options: int) -> tuple[Tensor, Tensor, Tensor]:
    u, s, v = torch.svd_lowrank(p.row_weight[:, None] * p.weight, **options)
    return u[:, :rank], s[:rank], v[:, :rank].T


def excess(scaled: Tensor, values: Tensor, rank: int, factors: tuple[Tensor, ...]) -> dict[str, float]:
    """Of factors of ``scaled``, whose singular values are ``values``."""
    u, s, vh = factors[:3]
    rows = torch.linalg.vector_norm(scaled - (u * s) @ vh, dim=1)
    residual, norm = float(rows.double().norm()), float(torch.linalg.vector_norm(scaled, dim=1).double().norm())
    best = max(norm**2 - float(values[:rank].square().sum()), 0.0) ** 0.5
    return {"excess": residual / best - 1, "lost": (residual - best) / (norm - best)}


@pytest.mark.parametrize("rank", [16, 32])
@pytest.mark.parametrize("spectrum", ["flat", "power law"])
def test_weighted_svd(bench, shape: tuple[int, int], spectrum: str, rank: int):
    p = problem(*shape, spectrum)
    quality: dict[str, dict[str, float]] = {}

    def judged(name: str, role: str, run: Callable[[], tuple[Tensor, ...]]) -> Candidate:
        def check(factors: tuple[Tensor, ...]) -> None:
            quality[name] = excess(p.scaled, p.values, rank, factors)
            if role == "ours":
                assert quality[name]["excess"] <= 1e-4 + 1e-6 and quality[name]["lost"] <= 0.01 + 1e-4

        return Candidate(name, role, run, check=check)

    candidates = [
        judged("weighted_svd", "ours", lambda: weighted_svd(p.weight, p.row_weight, rank)),
        judged("svd_lowrank(q=r)", "peer", lambda: lowrank(p, rank, q=rank)),
        judged("svd_lowrank(q=4r, niter=4)", "peer", lambda: lowrank(p, rank, q=4 * rank, niter=4)),
    ]
    workload = f"weighted SVD, {shape[0]} x {shape[1]}, {spectrum}, rank {rank}"
    found = bench.measure(workload, candidates, work=p.weight.nbytes, unit="GB/s")
    for name, measurement in found.items():
        measurement.quality = quality[name]
    ours = found["weighted_svd"]
    bench.report.measurements.append(replace(p.whole, workload=ours.workload, allocator=ours.allocator))
    bench.target(workload, "residual above the optimum's, relative", ours.quality["excess"], 1e-4)
    bench.target(workload, "lost, share of what there is to gain", ours.quality["lost"], 0.01)
    if min(shape) >= 2048:
        bench.target(workload, "linalg.svd / ours", p.whole.median_ms / ours.median_ms, 30.0, at_least=True)
