"""weighted_svd against torch.linalg.svd in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from svd_oracle import CASES, assert_contract, assert_orthonormal, case, with_spectrum

from loku_kernels.svd import krylov_block, weighted_svd


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
