"""The C++ Fisher kernels on every instruction set of this processor, beneath the public operator."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from loku_kernels import processor
from loku_kernels.backends import cpp

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# One above and below the kernels' tiles (8 x 48, 6 x 16, 6 x 8) and blocks (256 x 768), what lies between, and blocks
# of several panels of 256 rows.
SHAPES = [(1, 1), (7, 17), (17, 7), (49, 100), (100, 49), (8, 48), (1, 769), (257, 1), (300, 800), (4500, 9)]
# A chunk has 224 tokens, or 448 in bfloat16: sequences that share one, fill one, and take several.
LENGTHS = [
    [],
    [0],
    [1],
    [1, 0, 2, 3, 0],
    [20, 57, 120, 33],
    [224, 224],
    [223, 2],
    [225, 1],
    [449, 3],
    [1001],
    [1] * 500,
]


@pytest.fixture(params=cpp.instruction_sets() or [pytest.param(None, marks=pytest.mark.skip(cpp.missing_reason()))])
def kernels(request: pytest.FixtureRequest) -> cpp.CppBackend:
    return cpp.CppBackend(request.param)


def truth_and_bound(fisher: Tensor, inputs: Tensor, grad_outputs: Tensor, offsets: Tensor, weights: Tensor):
    """The sum in float64, and what one rounding of each sum of absolute values on the way could change."""
    eps = torch.finfo(torch.float32).eps
    truth = fisher.double()
    bound = eps * truth.abs()
    for s, weight in enumerate(weights.double()):
        rows = slice(int(offsets[s]), int(offsets[s + 1]))
        d, a = grad_outputs[rows].double().T, inputs[rows].double()
        g, g_error = d @ a, eps * (d.abs() @ a.abs())
        truth = truth + weight * g**2
        bound = bound + eps * truth + weight * (2 * g.abs() + g_error) * g_error
    return truth, bound


def random_problem(out: int, columns: int, lengths: list[int], dtype: torch.dtype, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    inputs = torch.randn(int(offsets[-1]), columns, generator=generator).to(dtype)
    grad_outputs = torch.randn(int(offsets[-1]), out, generator=generator).to(dtype)
    fisher = torch.rand(out, columns, generator=generator)
    return fisher, inputs, grad_outputs, offsets, torch.rand(len(lengths), generator=generator)


def assert_accurate(kernels: cpp.CppBackend, problem: tuple[Tensor, ...], roundings: float) -> None:
    truth, bound = truth_and_bound(*problem)
    kernels.fisher_accumulate(*problem)
    error = (problem[0].double() - truth).abs()
    assert (error <= roundings * bound).all(), f"{(error / bound).max():.3g} roundings"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("out, columns", SHAPES)
def test_against_float64(kernels, out, columns, dtype):
    for lengths in LENGTHS:
        assert_accurate(kernels, random_problem(out, columns, lengths, dtype), 4)


@settings(max_examples=30, deadline=None)
@given(
    out=st.integers(1, 40),
    columns=st.integers(1, 120),
    lengths=st.lists(st.integers(0, 60), max_size=12),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 1000),
)
def test_any_packing(out, columns, lengths, dtype, seed):
    for name in cpp.instruction_sets():
        assert_accurate(cpp.CppBackend(name), random_problem(out, columns, lengths, dtype, seed), 4)


@pytest.mark.skipif("avx512bf16" not in cpp.instruction_sets(), reason="needs AVX-512 with bfloat16")
@pytest.mark.parametrize(("slow", "instruction_set"), [(True, "avx512"), (False, "avx512bf16")])
def test_bfloat16_is_widened_where_its_products_are_slow(monkeypatch, slow, instruction_set):
    monkeypatch.setattr(processor, "has_slow_bfloat16", lambda: slow)
    found, expected = (random_problem(300, 100, [120, 333], torch.bfloat16) for _ in range(2))
    cpp.CppBackend().fisher_accumulate(*found)
    cpp.CppBackend(instruction_set).fisher_accumulate(*expected)
    assert torch.equal(found[0], expected[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_over_decades(kernels, dtype):
    fisher, inputs, grad_outputs, offsets, weights = random_problem(49, 100, [20, 1, 300], dtype)
    decades = torch.logspace(-3, 3, inputs.shape[0])
    inputs = (inputs.float() * decades[:, None]).to(dtype)
    grad_outputs = (grad_outputs.float() * decades.flip(0)[:, None]).to(dtype)
    weights = torch.tensor([1e-6, 1.0, 1e6])
    assert_accurate(kernels, (fisher.mul_(1e-6), inputs, grad_outputs, offsets, weights), 4)


def test_strided_operands_and_untouched_neighbours(kernels):
    fisher, inputs, grad_outputs, offsets, weights = random_problem(17, 49, [5, 30], torch.bfloat16)
    padded = torch.full((17, 60), 7.0)
    padded[:, :49] = fisher
    wide = [torch.randn(35, 200, dtype=torch.bfloat16) for _ in range(2)]
    wide[0][:, 3:52], wide[1][:, 5:22] = inputs, grad_outputs
    kernels.fisher_accumulate(padded[:, :49], wide[0][:, 3:52], wide[1][:, 5:22], offsets, weights)
    kernels.fisher_accumulate(fisher, inputs, grad_outputs, offsets, weights)
    assert torch.equal(padded[:, :49], fisher)
    assert (padded[:, 49:] == 7.0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_bits_whatever_the_threads_and_neighbours(kernels, dtype):
    fisher, inputs, grad_outputs, offsets, weights = random_problem(300, 500, [700, 3, 90], dtype)
    results, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 7):
            torch.set_num_threads(count)
            results.append(fisher.clone())
            kernels.fisher_accumulate(results[-1], inputs, grad_outputs, offsets, weights)
    finally:
        torch.set_num_threads(threads)
    part = fisher[40:57, 13:100].clone()
    kernels.fisher_accumulate(part, inputs[:, 13:100], grad_outputs[:, 40:57], offsets, weights)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    assert torch.equal(results[0][40:57, 13:100], part)


def test_offsets_outside_the_tokens_are_clamped(kernels):
    fisher, inputs, grad_outputs, _, _ = random_problem(9, 20, [40], torch.float32)
    expected = fisher.clone()
    weights = torch.tensor([1.0, 1.0, 1.0, 1.0])
    kernels.fisher_accumulate(expected, inputs, grad_outputs, torch.tensor([0, 10, 40, 40, 40]), weights)
    kernels.fisher_accumulate(fisher, inputs, grad_outputs, torch.tensor([-(2**62), 10, 99, 2**62, 2**62]), weights)
    assert torch.equal(fisher, expected)


def test_offsets_leave_tokens_out(kernels):
    fisher, inputs, grad_outputs, _, weights = random_problem(9, 20, [40], torch.bfloat16)
    inputs[:3], inputs[31:] = float("nan"), float("nan")
    assert_accurate(kernels, (fisher, inputs, grad_outputs, torch.tensor([3, 31]), weights), 4)


def test_not_a_number_stays_in_its_row(kernels):
    fisher, inputs, grad_outputs, offsets, weights = random_problem(9, 20, [5, 4], torch.bfloat16)
    grad_outputs[8, 4] = float("nan")
    kernels.fisher_accumulate(fisher, inputs, grad_outputs, offsets, weights)
    assert fisher[4].isnan().all()
    assert fisher[torch.arange(9) != 4].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(0,), (1,), (7,), (17, 49), (300, 501)], ids=str)
def test_from_a_gradient(kernels, shape, dtype):
    generator = torch.Generator().manual_seed(0)
    fisher, grad = torch.rand(shape, generator=generator), torch.randn(shape, generator=generator).to(dtype)
    truth = fisher.double() + 0.3 * grad.double() ** 2
    kernels.fisher_accumulate_grad(fisher, grad, 0.3)
    torch.testing.assert_close(fisher.double(), truth, rtol=3e-7, atol=0)
