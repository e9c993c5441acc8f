"""weighted_svd beside torch.linalg.svd and torch.svd_lowrank: time, and what the residual has above the optimum.

`excess` is that relative to the optimum; `lost` its share of what rank 0's residual has above the optimum, in percent.
The full SVD of a matrix is computed once, timed, and serves as the optimum; the others run in turns.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from loku_kernels.svd import weighted_svd

SHAPES = [(768, 3072), (2048, 8192), (4096, 4096), (4096, 11008)]
QUICK_SHAPES = [(96, 160)]


class Problem(NamedTuple):
    weight: Tensor
    row_weight: Tensor
    scaled: Tensor
    values: Tensor
    svd_seconds: float


@functools.lru_cache(maxsize=1)
def problem(rows: int, columns: int, spectrum: str) -> Problem:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, columns, generator=generator)
    if spectrum == "power law":
        weight *= torch.arange(1, columns + 1) ** -0.6
    row_weight = 0.5 + torch.rand(rows, generator=generator)
    scaled = row_weight[:, None] * weight
    start = time.perf_counter()
    values = torch.linalg.svd(scaled, full_matrices=False)[1]
    return Problem(weight, row_weight, scaled, values.double(), time.perf_counter() - start)


def lowrank(p: Problem, rank: int, **options: int) -> tuple[Tensor, Tensor, Tensor]:
    u, s, v = torch.svd_lowrank(p.row_weight[:, None] * p.weight, **options)
    return u[:, :rank], s[:rank], v[:, :rank].T


def excess(p: Problem, rank: int, factors: tuple[Tensor, ...]) -> tuple[float, float]:
    u, s, vh = factors[:3]
    rows = torch.linalg.vector_norm(p.scaled - (u * s) @ vh, dim=1)
    residual, norm = float(rows.double().norm()), float(torch.linalg.vector_norm(p.scaled, dim=1).double().norm())
    best = max(norm**2 - float(p.values[:rank].square().sum()), 0.0) ** 0.5
    return residual / best - 1, (residual - best) / (norm - best)


@pytest.mark.parametrize("rank", [16, 32])
@pytest.mark.parametrize("spectrum", ["flat", "power law"])
def test_weighted_svd(bench, benchmark, shape: tuple[int, int], spectrum: str, rank: int):
    p = problem(*shape, spectrum)
    methods: dict[str, Callable[[], tuple[Tensor, ...]]] = {
        "weighted_svd": lambda: weighted_svd(p.weight, p.row_weight, rank),
        "svd_lowrank(q=r)": lambda: lowrank(p, rank, q=rank),
        "svd_lowrank(q=4r, niter=4)": lambda: lowrank(p, rank, q=4 * rank, niter=4),
    }
    quality = {name: excess(p, rank, method()) for name, method in methods.items()}
    assert quality["weighted_svd"][0] <= 1e-4 + 1e-6 and quality["weighted_svd"][1] <= 0.01 + 1e-4
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    for _ in range(bench.rounds):
        for name, method in methods.items():
            start = time.perf_counter()
            method()
            seconds[name].append(time.perf_counter() - start)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    workload = f"weighted SVD, {shape[0]} x {shape[1]}, {spectrum}, rank {rank}"
    print(f"\n{workload}: linalg.svd {1e3 * p.svd_seconds:.0f} ms")
    for name, (relative, lost) in quality.items():
        speedup = p.svd_seconds / median[name]
        print(f"  {name:28}{1e3 * median[name]:8.1f} ms {speedup:7.1f}x   excess {relative:.1e}   lost {lost:.2%}")
    relative, lost = quality["weighted_svd"]
    bench.target(workload, "residual above the optimum's, relative", relative, 1e-4)
    bench.target(workload, "lost, share of what there is to gain", lost, 0.01)
    if min(shape) >= 2048:
        bench.target(workload, "linalg.svd / ours", p.svd_seconds / median["weighted_svd"], 30.0, at_least=True)
    benchmark.extra_info.update(
        {name: {"median_s": median[name], "excess": q[0], "lost": q[1]} for name, q in quality.items()},
        linalg_svd_s=p.svd_seconds,
    )
    benchmark.pedantic(methods["weighted_svd"], rounds=2)
