"""The C++ Gram product against float64, at every instruction set."""

from __future__ import annotations

import pytest
import torch

from loku_kernels import backends
from loku_kernels.svd import _Weighted, weighted_svd

SHAPES = [(1, 1, 16), (5, 200, 32), (48, 48, 16), (97, 49, 48), (130, 96, 64), (300, 77, 80)]


@pytest.fixture
def gram_product(backend):
    """Of the C++ backends."""
    if not backend.startswith("cpp"):
        pytest.skip(f"{backend} has no Gram product: it is formed by two products")
    kernels = backends.select(torch.empty(0))
    return lambda matrix, scales, x: kernels.gram_product(kernels.gram_tiles(matrix, scales, False), x)


def operands(rows: int, columns: int, width: int, by_rows: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows)
    matrix = torch.randn(rows, columns, generator=generator)
    scales = torch.rand(rows, generator=generator)
    return matrix if by_rows else matrix.T.contiguous().T, scales, torch.randn(columns, width, generator=generator)


def exact(matrix: torch.Tensor, scales: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    scaled = scales.double()[:, None] * matrix.double()
    return scaled.T @ (scaled @ x.double())


@pytest.mark.parametrize("by_rows", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gram_product_is_as_exact_as_two_products(gram_product, shape, by_rows):
    matrix, scales, x = operands(*shape, by_rows)
    expected = exact(matrix, scales, x)
    found = gram_product(matrix, scales, x)
    assert torch.equal(found, gram_product(scales[:, None] * matrix, torch.ones_like(scales), x))
    assert found.shape == expected.shape
    scaled = scales[:, None] * matrix
    of_torch = (scaled.T @ (scaled @ x) - expected).norm()
    assert (found - expected).norm() <= 2 * of_torch + 1e-7 * expected.norm()


def test_gram_product_reads_rows_that_are_apart(gram_product):
    matrix, scales, x = operands(100, 60, 16, True)
    wide = torch.full((100, 75), torch.nan)
    wide[:, :60] = matrix
    assert torch.equal(gram_product(wide[:, :60], scales, x), gram_product(matrix, scales, x))


def test_squares_of_scales_need_not_be_floats(gram_product):
    matrix, _, x = operands(60, 50, 16, True)
    scales = torch.full((60,), 1e25)
    found = gram_product(matrix * 1e-25, scales, x)
    torch.testing.assert_close(found.double(), exact(matrix * 1e-25, scales, x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_gram_product_on_any_number_of_threads(gram_product, threads):
    matrix, scales, x = operands(290, 70, 16, True)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = gram_product(matrix, scales, x)
        assert torch.equal(found, gram_product(matrix, scales, x))
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(found.double(), exact(matrix, scales, x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(40, 90), (90, 40)])
def test_both_orientations_and_any_strides(backend, device, shape):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(2 * shape[0], 2 * shape[1], generator=generator).to(device)[::2, ::2]
    row_weight = torch.rand(shape[0], generator=generator).to(device)
    rows = torch.randn(16, min(shape), generator=generator).to(device)
    a = row_weight.double()[:, None] * weight.double()
    gram = a @ a.T if shape[0] <= shape[1] else a.T @ a
    matrix = _Weighted.of(weight, row_weight)
    found = matrix.gram(rows).double() * matrix.scale**2
    torch.testing.assert_close(found, rows.double() @ gram, rtol=1e-4, atol=1e-4 * float(gram.abs().max()))


def test_svd_is_the_same_with_and_without_it(backend, device):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(500, 700, generator=generator).to(device)
    row_weight = torch.rand(500, generator=generator).to(device)
    found = weighted_svd(weight, row_weight, 8)
    with backends.use("reference"):
        expected = weighted_svd(weight, row_weight, 8)
    torch.testing.assert_close(found.S, expected.S, rtol=1e-4, atol=0)
    torch.testing.assert_close(found.residual, expected.residual, rtol=1e-5, atol=0)
