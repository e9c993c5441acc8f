"""Weights of rows: a number does what a tensor of it does, to the bit, wherever the two may differ."""

from __future__ import annotations

import pytest
import torch
from oracle import DTYPES, random_problem

import loku_kernels as lk
from loku_kernels import _validation, ops
from loku_kernels.backends import select
from loku_kernels.backends.weights import RowWeights

NUMBERS = [(1.0, 0.3), (-0.7, 2), (0, -1.1), (1, 0)]
ROWS, VOCABULARY, HIDDEN = 6, 333, 12


def _each_way(numbers, device):
    """Both numbers as they are, one and the other as a tensor, and both."""
    numbers = [(number, torch.full((ROWS,), number, device=device, dtype=torch.float64)) for number in numbers]
    return [(ihl, ce) for ihl in numbers[0] for ce in numbers[1]]


def _assert_all_alike(results):
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("numbers", NUMBERS, ids=str)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_from_logits(backend, device, dtype, numbers):
    logits, labels = random_problem(ROWS, VOCABULARY, dtype, device)
    logits[0, labels[0]] = -torch.inf  # whose cross-entropy is infinite
    results = []
    for weights in _each_way(numbers, device):
        z = logits.clone().requires_grad_()
        loss, statistics = lk.fused_unlearning_loss(z, labels, *weights, reduction="sum", return_statistics=True)
        loss.backward()
        results.append((loss, *statistics, z.grad))
    _assert_all_alike(results)
    assert results[0][0].isinf() == (numbers[1] != 0)


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("numbers", NUMBERS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_from_hidden_states(backend, device, dtype, numbers, reduction):
    """In several chunks of some rows; of single losses the gradients come from a table that the weights are in."""
    generator = torch.Generator().manual_seed(0)
    shapes = (ROWS, HIDDEN), (VOCABULARY, HIDDEN)
    values = [torch.randn(shape, generator=generator, dtype=dtype).to(device) for shape in shapes]
    labels = torch.tensor([3, -100, 332, 0, 77, 5], device=device)
    results = []
    for weights in _each_way(numbers, device):
        h, w = (value.clone().requires_grad_() for value in values)
        loss = lk.fused_linear_unlearning_loss(
            h, w, labels, *weights, reduction=reduction, chunk_bytes=2 * VOCABULARY * dtype.itemsize
        )
        results.append((loss, *torch.autograd.grad(loss.sum(), (h, w))))
    _assert_all_alike(results)


@pytest.mark.parametrize("kernel", ["row_losses", "row_losses_and_gradient_"])
def test_a_factor_multiplies_a_tensor(backend, device, kernel):
    logits, labels = random_problem(ROWS, VOCABULARY, torch.float32, device)
    ihl_weight, ce_weight = torch.linspace(-1, 2, ROWS, device=device), torch.linspace(3, 0, ROWS, device=device)
    run, settings = getattr(select(logits), kernel), {"ignore_index": -100, "scale": 1.0, "softcap": 0.0}
    results = []
    for weights in ((ihl_weight, 0.5, ce_weight, -4.0), (0.5 * ihl_weight, 1.0, -4.0 * ce_weight, 1.0)):
        z = logits[None].clone()
        results.append((*run(z, labels, RowWeights(*weights), **settings), z))
    _assert_all_alike(results)


def test_strides_of_weights(backend, device):
    """Every other entry of one tensor, one entry of another for all rows."""
    logits, labels = random_problem(ROWS, VOCABULARY, torch.float32, device)
    spaced, one = torch.linspace(-1, 2, 2 * ROWS, device=device)[::2], torch.tensor(0.4, device=device)
    losses = [
        lk.fused_unlearning_loss(logits, labels, *weights, reduction="none")
        for weights in ((spaced, one), (spaced.contiguous(), 0.4), (spaced.clone(), one.repeat(ROWS)))
    ]
    _assert_all_alike(losses)


def test_numbers_reach_the_operators_as_numbers():
    labels = torch.zeros(2, 3, dtype=torch.int64)
    for number in (2, -0.5, True):
        assert _validation.row_weights("ihl_weight", number, labels, torch.float32) == (None, float(number))
    weights, factor = _validation.row_weights("ihl_weight", torch.tensor([1, 2, 3]), labels, torch.float32)
    assert factor == 1 and weights.dtype == torch.float32 and weights.tolist() == [1, 2, 3, 1, 2, 3]


def test_statistics_alone_have_no_loss(backend, device):
    """Their table is that of a loss with weights of 0, also where the losses are infinite."""
    logits, labels = random_problem(ROWS, VOCABULARY, torch.float32, device)
    logits[0, labels[0]] = -torch.inf
    *_, table = ops.target_statistics(logits[None], labels, -100, 1.0, 0.0)
    zero = torch.zeros(ROWS, device=device)
    *_, expected, _ = ops.unlearning_loss(logits[None], labels, zero, 1.0, zero, 1.0, -100, 1.0, 0.0, "none", False)
    assert torch.equal(table, expected) and not table[0].any() and not table[4:].any()
