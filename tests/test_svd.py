"""weighted_svd against torch.linalg.svd in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loku_kernels import _krylov
from loku_kernels import svd as module
from loku_kernels.svd import WeightedSVD, allowed_energy, krylov_block, weighted_svd

FLOAT32_FLOOR = 8 * 2.0**-23


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


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("rows", "columns"), [(384, 640), (640, 384), (400, 400)])
@pytest.mark.parametrize("rank", [1, 5, 16])
def test_contract_where_the_iteration_is_chosen(name, rows, columns, rank):
    assert krylov_block(rows, columns, rank) is not None
    weight, row_weight = case(name, rows, columns)
    weight, row_weight = weight.float(), row_weight.float()
    assert_contract(weighted_svd(weight, row_weight, rank), weight, row_weight, rank)


@pytest.mark.parametrize("name", ["flat", "eight decades"])
@pytest.mark.parametrize("rank", [16, 32])
def test_contract_at_the_size_of_a_layer(name, rank):
    weight, row_weight = case(name, 768, 2048)
    weight, row_weight = weight.float(), row_weight.float()
    assert_contract(weighted_svd(weight, row_weight, rank), weight, row_weight, rank)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(
    ("rows", "columns", "rank"), [(48, 96, 8), (96, 48, 48), (7, 5, 3), (5, 7, 5), (1, 9, 1), (9, 1, 1)]
)
def test_contract_of_small_matrices(name, rows, columns, rank):
    weight, row_weight = case(name, rows, columns)
    weight, row_weight = weight.float(), row_weight.float()
    assert_contract(weighted_svd(weight, row_weight, rank), weight, row_weight, rank)


@pytest.mark.parametrize("rank", [8, 300])
def test_float64_keeps_its_digits(rank):
    weight, row_weight = case("power law", 400, 420)
    got = weighted_svd(weight, row_weight, rank, rtol=1e-10)
    assert {x.dtype for x in got} == {torch.float64}
    assert_contract(got, weight, row_weight, rank, rtol=1e-10, floor=1e-14)
    exact = torch.linalg.svdvals(row_weight[:, None] * weight)[:rank]
    torch.testing.assert_close(got.S, exact, rtol=1e-8, atol=0)


def test_full_rank_reproduces_the_matrix():
    weight, row_weight = case("flat", 40, 30)
    got = weighted_svd(weight.float(), row_weight.float(), 30)
    assert float(got.residual) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_are_worked_on_in_float32(dtype):
    weight, row_weight = case("power law", 300, 400)
    weight = (10 * weight).to(dtype)
    got = weighted_svd(weight, row_weight.to(dtype), 16)
    assert {x.dtype for x in got} == {torch.float32}
    assert_contract(got, weight, row_weight.to(dtype), 16)


@pytest.mark.parametrize(("rows", "columns"), [(400, 512), (512, 400), (60, 80)])
def test_rows_of_tiny_weight_keep_their_relative_accuracy(rows, columns):
    weight, row_weight = case("eight decades", rows, columns)
    got = weighted_svd(weight.float(), row_weight.float(), 8)
    # Row i of U S is d_i w_i V for whatever V was found: FILA divides it by d_i.
    expected = weight.float().double() @ got.Vh.double().T
    unweighted = got.U.double() * got.S.double() / row_weight.float().double()[:, None]
    error = (unweighted - expected).norm(dim=1) / weight.norm(dim=1)
    assert float(error.max()) < 1e-6


@pytest.mark.parametrize(("rows", "columns", "rank"), [(400, 450, 16), (450, 400, 16), (40, 30, 10)])
def test_rows_of_no_weight_are_exactly_zero(rows, columns, rank):
    weight, row_weight = case("zero rows", rows, columns)
    got = weighted_svd(weight.float(), row_weight.float(), rank)
    assert (got.U[row_weight == 0] == 0).all()
    assert (got.U[row_weight > 0].norm(dim=1) > 0).all()


@pytest.mark.parametrize(("rows", "columns", "rank"), [(512, 600, 16), (600, 512, 16), (40, 30, 12)])
@pytest.mark.parametrize("true_rank", [0, 1, 7])
@pytest.mark.parametrize("sparse", [False, True])
def test_surplus_rank_gives_exact_zeros_and_whole_bases(rows, columns, rank, true_rank, sparse):
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(rows, columns, generator=generator)
    row_weight = torch.zeros(rows)
    if sparse:  # as many rows as the rank carry weight
        row_weight[torch.randperm(rows, generator=generator)[:true_rank]] = 2.0
    else:
        row_weight[: rows // 2] = 0.5
        left = torch.randn(rows, true_rank, generator=generator)
        weight = left @ torch.randn(true_rank, columns, generator=generator)
    got = weighted_svd(weight, row_weight, rank)
    assert (got.S[:true_rank] > 0).all() and (got.S[true_rank:] == 0).all()
    assert float(got.residual) < 1e-6
    assert_orthonormal(got)
    if not sparse:
        assert (got.U[row_weight == 0] == 0).all()


def test_structured_matrix_that_exhausts_the_space_at_once():
    got = weighted_svd(torch.ones(512, 640), torch.ones(512), 16)
    assert float(got.S[0]) == pytest.approx(math.sqrt(512 * 640), rel=1e-6)
    assert (got.S[1:] == 0).all() and float(got.residual) < 1e-6
    assert_orthonormal(got)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
@pytest.mark.parametrize("rows", [40, 400])
def test_extreme_magnitudes(scale, rows):
    weight, row_weight = case("power law", rows, 420)
    weight, row_weight = weight.float(), row_weight.float()
    got = weighted_svd(weight * scale, row_weight, 8)
    plain = weighted_svd(weight, row_weight, 8)
    torch.testing.assert_close(got.S / scale, plain.S, rtol=1e-5, atol=0)
    torch.testing.assert_close(got.residual, plain.residual, rtol=1e-5, atol=0)


@pytest.mark.parametrize("rows", [40, 400])
def test_a_row_whose_squares_vanish_counts_by_its_weight(rows):
    weight, row_weight = torch.randn(rows, 500), torch.full((rows,), 1e-30)
    weight[7] *= 1e-25
    row_weight[7] = 1e25
    assert_contract(weighted_svd(weight, row_weight, 1), weight, row_weight, 1)


@pytest.mark.parametrize("columns", [3, 500])
def test_rows_too_short_for_float32_beside_the_longest(columns):
    weight = torch.randn(columns, columns) * torch.logspace(-20, 20, columns)[:, None]
    row_weight = (1 / weight.double().norm(dim=1)).float()
    assert_contract(weighted_svd(weight, row_weight, 2), weight, row_weight, 2)


def test_batch_equals_loop():
    generator = torch.Generator().manual_seed(4)
    weight = torch.randn(2, 3, 390, 400, generator=generator)
    row_weight = torch.rand(2, 3, 390, generator=generator)
    row_weight[0, 1] = 0
    got = weighted_svd(weight, row_weight, 5)
    assert [tuple(x.shape) for x in got] == [(2, 3, 390, 5), (2, 3, 5), (2, 3, 5, 400), (2, 3)]
    for i in range(2):
        for j in range(3):
            for batched, single in zip(got, weighted_svd(weight[i, j], row_weight[i, j], 5), strict=True):
                assert torch.equal(batched[i, j], single)


def test_neither_autocast_nor_the_default_device_matters():
    weight, row_weight = case("flat", 400, 500)
    weight, row_weight = weight.float(), row_weight.float()
    expected = weighted_svd(weight[None], row_weight[None], 6)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.device("meta"):
        got = weighted_svd(weight[None], row_weight[None], 6)
    assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))


def test_empty_batch():
    got = weighted_svd(torch.zeros(0, 6, 5), torch.zeros(0, 6), 2)
    assert [tuple(x.shape) for x in got] == [(0, 6, 2), (0, 2), (0, 2, 5), (0,)]


def test_strided_weight_is_left_as_it_was():
    weight, row_weight = case("flat", 400, 500)
    strided = weight.float().T.contiguous().T
    before = strided.clone()
    got = weighted_svd(strided, row_weight.float(), 6)
    assert torch.equal(strided, before)
    assert_contract(got, strided, row_weight.float(), 6)


def test_deterministic_and_seeded():
    weight, row_weight = case("flat", 400, 500)
    weight, row_weight = weight.float(), row_weight.float()

    def run(seed):
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        return weighted_svd(weight, row_weight, 6, generator=generator)

    state = torch.get_rng_state()
    for seed in (None, 5):
        assert all(torch.equal(a, b) for a, b in zip(run(seed), run(seed), strict=True))
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(run(5).U, run(6).U)
    generator = torch.Generator().manual_seed(5)
    first, second = (weighted_svd(weight, row_weight, 6, generator=generator) for _ in range(2))
    assert not torch.equal(first.U, second.U)


@pytest.mark.parametrize(("rows", "columns"), [(400, 450), (30, 40)])
def test_signs_do_not_depend_on_the_start(rows, columns):
    weight, row_weight = case("power law", rows, columns)
    got = weighted_svd(weight, row_weight, 6, rtol=1e-12)
    other = weighted_svd(weight, row_weight, 6, rtol=1e-12, generator=torch.Generator().manual_seed(9))
    torch.testing.assert_close(got.U, other.U, rtol=0, atol=1e-5)
    assert (got.Vh.gather(1, got.Vh.abs().argmax(1, keepdim=True)) > 0).all()


def test_grad_is_not_recorded():
    weight = torch.randn(8, 9, requires_grad=True)
    assert not weighted_svd(weight, torch.ones(8), 2).U.requires_grad


# --- the estimate of what is missing


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


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 70),
    columns=st.integers(1, 70),
    data=st.data(),
)
def test_contract_of_structured_input(rows, columns, data):
    rank = data.draw(st.integers(1, min(rows, columns)), label="rank")
    weights = st.one_of(st.just(0.0), st.floats(2.0**-26, 1.0, width=32), st.sampled_from([1.0, 1e-4, 1e4]))
    row_weight = torch.tensor(data.draw(st.lists(weights, min_size=rows, max_size=rows), label="row_weight"))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99), label="seed"))
    if data.draw(st.booleans(), label="integers"):
        weight = torch.randint(-1, 2, (rows, columns), generator=generator).float()
    else:
        weight = torch.randn(rows, columns, generator=generator)
    assert_contract(weighted_svd(weight, row_weight, rank), weight, row_weight, rank)


@settings(max_examples=25, deadline=None)
@given(
    exponent=st.floats(0.0, 4.0),
    decades=st.floats(0.0, 10.0),
    plateau=st.integers(1, 64),
    rank=st.integers(1, 20),
    tall=st.booleans(),
)
def test_contract_of_the_iteration_over_spectra(exponent, decades, plateau, rank, tall):
    """Power laws in stairs: `plateau` equal singular values on each tread."""
    order = 1 + torch.arange(400, dtype=torch.float64) // plateau
    weight = with_spectrum(order**-exponent, 400, 420).float()
    weight = weight.T.contiguous() if tall else weight
    row_weight = 10 ** (-decades * torch.rand(len(weight), generator=torch.Generator().manual_seed(plateau)))
    assert_contract(weighted_svd(weight, row_weight, rank), weight, row_weight, rank)


# --- the choice of method


def test_choice_by_shape():
    assert krylov_block(4096, 11008, 16) == 16
    assert krylov_block(11008, 4096, 17) == 32
    assert krylov_block(64, 4096, 4) is None
    assert krylov_block(768, 3072, 256) is None
