"""fisher_accumulate and fisher_accumulate_grad as users call them, on every backend of this machine."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from loku_kernels import fisher_accumulate, fisher_accumulate_grad
from loku_kernels.ops import fisher as ops

LOW_DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def problem(device: torch.device, dtype: torch.dtype, *shape: int) -> tuple[Tensor, Tensor, Tensor]:
    """fisher (9, 20), inputs (*shape, 20), grad_outputs (*shape, 9)."""
    generator = torch.Generator().manual_seed(0)
    accumulator = torch.float64 if dtype == torch.float64 else torch.float32
    fisher = torch.rand(9, 20, generator=generator).to(device, accumulator)
    inputs, grads = (torch.randn(*shape, n, generator=generator).to(device, dtype) for n in (20, 9))
    return fisher, inputs, grads


def definition(fisher: Tensor, inputs: Tensor, grads: Tensor, bounds: list[int], weights: list[float]) -> Tensor:
    inputs, grads = inputs.double().flatten(0, -2), grads.double().flatten(0, -2)
    total = fisher.double()
    for s, weight in enumerate(weights):
        rows = slice(bounds[s], bounds[s + 1])
        total = total + weight * (grads[rows].T @ inputs[rows]) ** 2
    return total


def assert_rounded(found: Tensor, expected: Tensor) -> None:
    eps = torch.finfo(found.dtype).eps
    torch.testing.assert_close(found.double(), expected, rtol=16 * eps, atol=16 * eps * float(expected.max()))


@pytest.mark.parametrize("dtype", LOW_DTYPES, ids=str)
def test_each_row_of_a_batch_is_a_sequence(backend, device, dtype):
    fisher, inputs, grads = problem(device, dtype, 3, 7)
    expected = definition(fisher, inputs, grads, [0, 7, 14, 21], [1, 1, 1])
    assert fisher_accumulate(fisher, inputs, grads) is None
    assert_rounded(fisher, expected)


@pytest.mark.parametrize("dtype", LOW_DTYPES, ids=str)
@pytest.mark.parametrize("index", [torch.int64, torch.int32], ids=str)
def test_packed_sequences_with_weights(backend, device, dtype, index):
    """Offsets count through the whole batch; an empty sequence adds nothing; weights of any floating dtype."""
    bounds, weights = [0, 5, 5, 18, 21], [0.5, 3.0, 0.0, 2.0]
    fisher, inputs, grads = problem(device, dtype, 3, 7)
    expected = definition(fisher, inputs, grads, bounds, weights)
    offsets = torch.tensor(bounds, dtype=index, device=device)
    fisher_accumulate(fisher, inputs, grads, offsets=offsets, weights=torch.tensor(weights, device=device).bfloat16())
    assert_rounded(fisher, expected)


def test_two_dimensions_are_one_sequence_and_strides_do_not_matter(backend, device):
    fisher, inputs, grads = problem(device, torch.float32, 11)
    expected = definition(fisher, inputs, grads, [0, 11], [1.0])
    fisher_accumulate(fisher, inputs.T.contiguous().T, grads.T.contiguous().T)
    assert_rounded(fisher, expected)


def test_float64_keeps_its_digits(device):
    fisher, inputs, grads = problem(device, torch.float64, 3, 7)
    expected = definition(fisher, inputs, grads, [0, 10, 21], [0.3, 4.0])
    weights = torch.tensor([0.3, 4.0], dtype=torch.float64, device=device)
    fisher_accumulate(fisher, inputs, grads, offsets=torch.tensor([0, 10, 21], device=device), weights=weights)
    assert_rounded(fisher, expected)


def test_no_tokens(backend, device):
    fisher, inputs, grads = problem(device, torch.float32, 0)
    before = fisher.clone()
    fisher_accumulate(fisher, inputs, grads)
    fisher_accumulate(fisher, inputs, grads.new_empty(0, 2 * grads.shape[1])[:, ::2])
    fisher_accumulate(fisher, inputs, grads, offsets=torch.zeros(4, dtype=torch.int64, device=device))
    assert torch.equal(fisher, before)


def test_gradients_that_are_recorded_are_not_followed(device):
    fisher, inputs, grads = problem(device, torch.float32, 2, 3)
    fisher_accumulate(fisher, inputs.requires_grad_(), grads.requires_grad_())
    assert not fisher.requires_grad


@pytest.mark.parametrize("dtype", LOW_DTYPES, ids=str)
def test_from_a_gradient(backend, device, dtype):
    fisher, grad, _ = problem(device, dtype, 9)
    expected = fisher.double() + 0.3 * grad.double() ** 2
    fisher_accumulate_grad(fisher, grad, 0.3)
    assert_rounded(fisher, expected)
    vector = torch.zeros(9, device=device)
    fisher_accumulate_grad(vector, grad[:, 3])
    assert_rounded(vector, grad[:, 3].double() ** 2)


def test_opcheck(backend, device):
    fisher, inputs, grads = problem(device, torch.float32, 11)
    offsets, weights = torch.tensor([0, 4, 11], device=device), torch.ones(2, device=device)
    torch.library.opcheck(ops.fisher_accumulate, (fisher, inputs, grads, offsets, weights))
    torch.library.opcheck(ops.fisher_accumulate_grad, (fisher, torch.ones_like(fisher), 0.5))


@pytest.mark.parametrize(
    "change,error,words",
    [
        ({"fisher": torch.zeros(9, 20, dtype=torch.bfloat16)}, TypeError, "fisher must be a torch.float32 tensor"),
        ({"fisher": torch.zeros(20, 9)}, ValueError, r"fisher must have shape \(9, 20\), but has shape \(20, 9\)"),
        ({"fisher": torch.zeros(20, 9).T}, ValueError, "fisher must be contiguous"),
        ({"inputs": torch.zeros(20)}, ValueError, r"inputs must be \(tokens, in\) or \(batch, tokens, in\)"),
        ({"inputs": torch.zeros(3, 7, 20, dtype=torch.int64)}, TypeError, "inputs"),
        ({"grad_outputs": torch.zeros(3, 6, 9)}, ValueError, "grad_outputs must have the shape of inputs"),
        ({"grad_outputs": torch.zeros(3, 7, 9).double()}, TypeError, "grad_outputs"),
        ({"grad_outputs": torch.zeros(3, 7, 9, device="meta")}, ValueError, "grad_outputs"),
        ({"offsets": [0, 21]}, TypeError, "offsets must be an int64 or int32 tensor, but is list"),
        ({"offsets": torch.tensor([0.0, 21.0])}, TypeError, "offsets must be an int64 or int32 tensor, but is torch.f"),
        ({"offsets": torch.zeros(2, 2, dtype=torch.int64)}, ValueError, r"offsets must have shape \(sequences \+ 1,\)"),
        ({"offsets": torch.tensor([1, 21])}, ValueError, "offsets must start at 0, but start at 1"),
        ({"offsets": torch.tensor([0, 20])}, ValueError, "end at the number of tokens, 21, but end at 20"),
        ({"offsets": torch.tensor([0, 9, 8, 21])}, ValueError, r"offsets\[1\] is 9 and offsets\[2\] is 8"),
        ({"weights": torch.ones(2)}, ValueError, r"one entry per sequence, \(3,\), but has \(2,\)"),
        ({"weights": torch.ones(3, dtype=torch.int64)}, TypeError, "weights must be a floating-point tensor"),
    ],
)
def test_bad_input_is_named(change, error, words):
    arguments = {"fisher": torch.zeros(9, 20), "inputs": torch.ones(3, 7, 20), "grad_outputs": torch.ones(3, 7, 9)}
    with pytest.raises(error, match=words):
        fisher_accumulate(**(arguments | change))


@pytest.mark.parametrize(
    "fisher,grad,error,words",
    [
        (torch.zeros(2, 3), torch.zeros(3, 2), ValueError, r"fisher must have shape \(3, 2\)"),
        (torch.zeros(2, 3), torch.zeros(2, 3).double(), TypeError, "fisher must be a torch.float64 tensor"),
        (torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.int32), TypeError, "grad"),
        (torch.zeros(3, 2).T, torch.zeros(2, 3), ValueError, "fisher must be contiguous"),
    ],
)
def test_bad_gradient_is_named(fisher, grad, error, words):
    with pytest.raises(error, match=words):
        fisher_accumulate_grad(fisher, grad)
