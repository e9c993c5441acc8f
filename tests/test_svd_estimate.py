"""What weighted_svd takes for missing, when that convinces it, and the method it chooses."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from svd_oracle import CASES, assert_contract, case

from loku_kernels import _krylov
from loku_kernels import svd as module
from loku_kernels.svd import allowed_energy, krylov_block, weighted_svd


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("rank", [16, 24])
def test_too_few_steps_are_noticed(name, rank):
    """At every step from the first to convergence, what is truly missing is no more than what is said to be missing."""
    weight, row_weight = case(name, 600, 600)
    a = row_weight[:, None] * weight
    energy = torch.linalg.svdvals(a)[:rank].square().sum()
    generator = torch.Generator().manual_seed(7)
    start = torch.randn(32, 600, dtype=torch.float64, generator=generator)
    space = _krylov.BlockKrylov(lambda x: (x @ a) @ a.T, start, rank, generator)
    noticed = 0
    for _ in range(9):
        space.step()
        missing = float(energy) - space.energies[-1]
        assert space.leading(missing - 1e-12 * float(energy)) is None
        noticed += missing > 1e-4 * float(energy) and space.leading(1e-4 * float(energy)) is None
    assert noticed >= 1  # the first steps were too few indeed


@pytest.mark.parametrize("seed", [5, 47])
def test_a_cluster_exactly_as_wide_as_the_block(seed):
    """From these seeds the start block nearly misses a direction of the cluster, which two estimates do not see."""
    generator = torch.Generator().manual_seed(seed)
    left, right = (
        torch.linalg.qr(torch.randn(n, 480, generator=generator, dtype=torch.float64))[0] for n in (480, 520)
    )
    weight = ((left * 0.95 ** torch.arange(30).double().repeat_interleave(16)) @ right.T).float()
    assert_contract(weighted_svd(weight, torch.ones(480), 16), weight, torch.ones(480), 16)


def test_one_gain_does_not_convince():
    """A stall after large gains, as when a spectrum falls off steeply and then flattens."""
    assert _krylov.continued_gains([0.0, 1.0, 1.5]) == math.inf
    assert _krylov.continued_gains([0.0, 1.0, 1.5, 1.5 + 1e-9]) > 1e-9
    geometric = [1 - 0.5**i for i in range(6)]
    assert 0.5**5 <= _krylov.continued_gains(geometric) <= 4 * 0.5**5


@pytest.mark.parametrize("spread", [0.0, 0.1, 10.0])
def test_coupling_adds_no_more_than_the_gain_that_is_allowed_for_it(spread):
    """Whatever is outside the space, as long as none of its eigenvalues exceeds the least one inside."""
    generator = torch.Generator().manual_seed(int(10 * spread))
    for _ in range(20):
        values = 3.0 + spread * torch.rand(6, generator=generator, dtype=torch.float64)
        residuals = torch.randn(4, 6, generator=generator, dtype=torch.float64)
        bound = _krylov.coupled_gain(values, residuals.T @ residuals)
        orthonormal, _ = torch.linalg.qr(torch.randn(4, 4, generator=generator, dtype=torch.float64))
        for below in (torch.zeros(4), torch.rand(4, generator=generator), torch.tensor([0.0, 9.0, 9.0, 9.0])):
            outside = orthonormal @ torch.diag(values.min() - below.double()) @ orthonormal.T
            whole = torch.cat([torch.cat([values.diag(), residuals.T], 1), torch.cat([residuals, outside], 1)])
            gain = float(torch.linalg.eigvalsh(whole)[-6:].sum() - values.sum())
            assert gain <= bound + 1e-10
            assert below.any() or gain == pytest.approx(bound, rel=1e-7)
        nuclear = float(torch.linalg.svdvals(residuals).sum())
        assert bound == pytest.approx(nuclear, rel=1e-7) if spread == 0 else bound < nuclear


def test_iteration_that_does_not_converge_falls_back_to_the_exact_decomposition(monkeypatch):
    weight, row_weight = case("flat", 400, 500)
    weight, row_weight = weight.float(), row_weight.float()
    monkeypatch.setattr(_krylov, "continued_gains", lambda energies: math.inf)
    exact = []
    original = module._exact_rows
    monkeypatch.setattr(module, "_exact_rows", lambda *args: exact.append(args) or original(*args))
    got = weighted_svd(weight, row_weight, 8)
    assert len(exact) == 1
    assert_contract(got, weight, row_weight, 8, rtol=1e-6)


@given(
    residual=st.floats(0, 1),
    rtol=st.floats(1e-8, 0.5),
)
def test_allowed_energy_is_the_contract(residual, rtol):
    allowed = allowed_energy(residual, 1.0, rtol, torch.float64)
    least = math.sqrt(max(residual**2 - allowed, 0.0))
    floor = 1e-14
    assert residual <= (1 + rtol) * least * (1 + 1e-9) + floor
    assert residual <= least + 0.01 * (1 - least) + 1e-9 + floor


def test_choice_by_shape():
    assert krylov_block(4096, 11008, 16) == 16
    assert krylov_block(11008, 4096, 17) == 32
    assert krylov_block(64, 4096, 4) is None
    assert krylov_block(768, 3072, 256) is None
