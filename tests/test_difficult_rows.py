"""Rows that are hard on a running maximum and its sum: ties, infinities, NaN, very large logits, late runner-ups."""

from __future__ import annotations

import pytest
import torch
from oracle import DTYPES, eager_cross_entropy, eager_ihl, loss_and_gradient, random_problem

import loku_kernels as lk

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("tied", [[3, 9], [9, 40], [0, 49]])
def test_ties_go_to_the_lowest_index(backend, device, tied):
    logits = torch.zeros(1, 50, device=device)
    logits[0, tied] = 2.0
    label = torch.tensor([20], device=device)
    _, statistics = lk.fused_ihl(logits, label, return_statistics=True)
    assert statistics.runner_up_index.item() == tied[0]
    z = logits.requires_grad_()
    lk.fused_ihl(z, label).backward()
    assert z.grad[0].argmin().item() == tied[0]
    assert z.grad[0, tied[1]] > 0


@pytest.mark.parametrize("tied", [[700, 701], [700, 702, 720], [700, 2900], [2, 3, 2999]])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ties_in_a_long_row_are_all_but_one_part_of_the_rest(backend, device, dtype, tied):
    logits = torch.linspace(-1, 1, 3000, device=device).to(dtype)
    logits[tied] = 6.0
    label = torch.tensor(1234, device=device)
    statistics = lk.target_statistics(logits, label)
    rest = torch.ones(3000, dtype=torch.bool)
    rest[[tied[0], 1234]] = False
    assert statistics.runner_up_index.item() == tied[0]
    assert statistics.rest.item() == pytest.approx(logits.cpu().double()[rest].logsumexp(0).item(), rel=1e-6)


@pytest.mark.parametrize("rest", [1e-6, 1e-3, 0.5, 0.99, 1.01, 2.0, 20.0])
@pytest.mark.parametrize("column", [0, 1501, 2999], ids=["head", "body", "tail"])
def test_what_is_small_beside_the_runner_up_keeps_its_digits(backend, device, column, rest):
    """Whatever it takes to leave the runner-up's own 1 out of the sum: it may be subtracted from a large one only."""
    logits = torch.randn(3000, generator=torch.Generator().manual_seed(0))
    others = torch.ones(3000, dtype=torch.bool)
    others[[7, column]] = False
    logits[column] = logits[others].logsumexp(0) - torch.tensor(rest).log()
    truth = logits.double()[others].logsumexp(0)
    statistics = lk.target_statistics(logits.to(device), torch.tensor(7, device=device))
    assert statistics.runner_up_index.item() == column
    assert statistics.rest.item() == pytest.approx(truth.item(), abs=2e-6)


def test_tie_of_target_and_runner_up_counts_as_argmax_does(backend, device):
    logits = torch.zeros(2, 50, device=device)
    logits[:, [5, 30]] = 1.0
    labels = torch.tensor([5, 30], device=device)
    _, statistics = lk.fused_ihl(logits, labels, return_statistics=True)
    assert statistics.correct.tolist() == (logits.argmax(dim=1) == labels).tolist() == [True, False]
    assert statistics.loss.tolist() == [1.0, 1.0]


def test_rising_and_falling_rows(backend, device):
    """A new maximum at every element is the hardest case for a running maximum."""
    ramp = torch.linspace(-8, 8, 9001)
    logits = torch.stack([ramp, ramp.flip(0), ramp, ramp.flip(0)]).to(device)
    labels = torch.tensor([0, 9000, 9000, 0], device=device)
    loss, gradient = loss_and_gradient(
        lambda z: lk.fused_unlearning_loss(z, labels, 1.0, 1.0, reduction="none"), logits, torch.ones(4, device=device)
    )
    truth, true_gradient = loss_and_gradient(
        lambda z: eager_ihl(z, labels) + eager_cross_entropy(z, labels), logits.double(), torch.ones(4, device=device)
    )
    torch.testing.assert_close(loss, truth, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient, true_gradient, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_overflow_is_not_hidden(backend, device, dtype):
    """A logit of +inf, the target's or another, makes its row NaN as in torch's losses: a loss scaler looks for it."""
    logits, _ = random_problem(4, 300, dtype, device)
    logits[0, 5] = logits[1, 200] = logits[3, 7] = INF
    labels = torch.tensor([5, 5, 5, -100], device=device)
    z = logits.clone().requires_grad_()
    for loss in (lk.fused_ihl, lk.fused_cross_entropy):
        rows = loss(z, labels, reduction="none")
        (gradient,) = torch.autograd.grad(rows.sum(), z)
        assert rows.isnan().tolist() == [True, True, False, False]
        assert gradient.isnan().all(1).tolist() == [True, True, False, False]
        assert not gradient[2:].isnan().any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_minus_infinity(backend, device, dtype):
    """Forbidden tokens have probability 0 and gradient 0, be they most of the vocabulary, the target, or all others."""
    logits, _ = random_problem(4, 300, dtype, device)
    logits[0, 10:] = -INF
    logits[1, 5] = -INF
    logits[2, :] = -INF
    logits[2, 5] = 1.0
    logits[3, :7] = -INF
    labels = torch.tensor([3, 5, 5, 290], device=device)
    z = logits.clone().requires_grad_()
    loss = lk.fused_ihl(z, labels, reduction="none")
    loss.sum().backward()
    truth, true_gradient = loss_and_gradient(
        lambda x: eager_ihl(x, labels), logits.double(), torch.ones(4, device=device)
    )
    torch.testing.assert_close(loss.double(), truth, rtol=1e-6, atol=0)
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(z.grad.double(), true_gradient, rtol=tolerance, atol=tolerance * 1e-3)
    assert loss[2] == 2.0 and not z.grad[logits == -INF].any()
    target_first = logits[2:3].roll(-5, dims=1)
    for row, label, runner_up in ((logits[2:3], 5, 0), (target_first, 0, 1)):
        _, statistics = lk.fused_ihl(row, torch.tensor([label], device=device), return_statistics=True)
        assert statistics.runner_up_index.item() == runner_up
    cross_entropy = lk.fused_cross_entropy(logits, labels, reduction="none")
    assert cross_entropy[1] == INF and cross_entropy[2] == 0.0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_very_large_logits(backend, device, dtype):
    largest = torch.finfo(dtype).max
    logits, labels = random_problem(4, 300, dtype, device)
    logits[0, :2] = torch.tensor([largest, -largest], dtype=dtype)
    logits[1] = -largest
    logits[2] *= 1000
    logits[3, 7] = largest / 2
    labels = torch.tensor([0, 3, 5, 7], device=device)
    z = logits.clone().requires_grad_()
    loss = lk.fused_ihl(z, labels, reduction="none")
    loss.sum().backward()
    torch.testing.assert_close(loss.double(), eager_ihl(logits.double(), labels), rtol=1e-6, atol=1e-7)
    assert z.grad.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_runner_ups_on_the_way(backend, device, dtype):
    columns = torch.arange(5000, device=device)
    rows = [
        columns / 50,  # a new one in every vector
        columns // 700 * 10.0,
        columns // 700 * 100.0,  # what came before is nothing beside it
        torch.where(columns < 4000, -INF, 95.0 + columns % 7 / 4),
        torch.where(columns < 4000, -200.0, columns % 7 / 4),
        -columns / 50,
        torch.where(columns < 1500, -INF, columns % 7 / 4 - 200.0),  # all that is seen first is forbidden
    ]
    logits = torch.stack(rows).to(dtype)
    labels = torch.tensor([4990, 4999, 0, 4500, 4999, 1, 3000], device=device)
    ones = torch.ones(len(rows), device=device)
    ours = loss_and_gradient(lambda z: lk.fused_cross_entropy(z, labels, reduction="none"), logits, ones)
    truth = loss_and_gradient(lambda z: eager_cross_entropy(z, labels), logits.double(), ones)
    torch.testing.assert_close(ours[0].double(), truth[0], rtol=1e-6, atol=0)
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(ours[1].double(), truth[1], rtol=tolerance, atol=tolerance * 1e-3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("column", [5, 300, 4321, 4999])
def test_nan_logits_reach_the_loss(backend, device, dtype, column):
    logits, labels = random_problem(6, 5000, dtype, device)
    labels = labels.clamp(min=0)
    logits[0, labels[0]] = NAN
    logits[3:5, column] = NAN
    logits[4, column - 1] = 50.0  # a new maximum beside it
    labels[5] = 1
    logits[5, 2:] = -INF
    logits[5, [0, column]] = torch.tensor([-INF, NAN], dtype=dtype, device=device)
    labels[3] = 6  # the likeliest of what can be compared
    logits[3, 6] = 40.0
    loss, statistics = lk.fused_ihl(logits, labels, reduction="none", return_statistics=True)
    assert loss.isnan().tolist() == [True, False, False, True, True, True]
    assert not statistics.correct[loss.isnan()].any()


@pytest.mark.parametrize("offset", [-3e6, -1e3, -88.0, 1e3, 3e6])
def test_rows_far_from_zero(backend, device, offset):
    """All that matters is the distance from the runner-up, though sums begin from another reference."""
    logits, labels = random_problem(6, 5000, torch.float32, device)
    logits = logits + offset
    ones = torch.ones(6, device=device)
    ours = loss_and_gradient(lambda z: lk.fused_ihl(z, labels, reduction="none"), logits, ones)
    truth = loss_and_gradient(lambda z: eager_ihl(z, labels), logits.double(), ones)
    torch.testing.assert_close(ours[0], truth[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(ours[1], truth[1], rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("offset", [-1e30, -1e15, 1e8, 1e10, 1e20, 1e36])
def test_rows_so_far_that_neighbours_differ_by_more_than_one(backend, device, offset):
    generator = torch.Generator().manual_seed(0)
    steps = torch.randint(0, 5, (4, 5000), generator=generator) * abs(offset) * 2.0**-22
    logits = (offset + steps).to(device)
    labels = torch.tensor([0, 700, 4999, 12], device=device)
    loss = lk.fused_ihl(logits, labels, reduction="none")
    torch.testing.assert_close(loss.double(), eager_ihl(logits.double(), labels), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_largest_numbers_in_long_rows(backend, device, dtype):
    """Forbidden tokens are often given the smallest number there is, and their ties count."""
    largest = torch.finfo(dtype).max
    logits = torch.full((4, 5000), -largest, dtype=dtype, device=device)
    logits[1, 4000] = 0.0
    logits[2, [30, 700, 4998]] = largest
    logits[3, [700, 4998]] = 1.0
    labels = torch.tensor([17, 4000, 4000, 30], device=device)
    loss = lk.fused_ihl(logits, labels, reduction="none")
    torch.testing.assert_close(loss.double(), eager_ihl(logits.double(), labels), rtol=1e-6, atol=0)
    if dtype != torch.float16:  # whose largest number is no hindrance
        statistics = lk.target_statistics(logits[:1].expand(2, -1), labels[:2])
        assert statistics.runner_up.tolist() == [-largest, -largest]


def test_subnormal_numbers_are_as_before_afterwards(backend, device):
    logits, labels = random_problem(64, 5000, torch.float32, device)
    logits = logits.requires_grad_()
    lk.fused_ihl(logits, labels).backward()
    assert (torch.full((1 << 16,), 1e-38, device=device) * 0.01 > 0).all()


@pytest.mark.parametrize("shift", range(4))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_runner_up_in_every_column(backend, device, dtype, shift):
    """Rows start at every address modulo 16 bytes; the kernels handle a row's ends apart from its body."""
    rows = columns = 90
    logits = torch.randn(rows * columns + shift, generator=torch.Generator().manual_seed(0)).to(dtype).to(device)
    logits = logits[shift:].view(rows, columns)
    logits.fill_diagonal_(6.0)
    for labels in (torch.arange(rows, device=device).roll(distance) for distance in (1, -1, 40)):
        loss, statistics = lk.fused_ihl(logits, labels, reduction="none", return_statistics=True)
        assert torch.equal(statistics.runner_up_index, torch.arange(rows, device=device))
        torch.testing.assert_close(loss.double(), eager_ihl(logits.double(), labels), rtol=1e-5, atol=0)


@pytest.mark.parametrize("magnitude", [2.0**12, 2.0**27, 2.0**28, 2.0**35, 2.0**126])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ties_of_huge_logits(backend, device, dtype, magnitude):
    """Beside logits whose product with log2 e rounds to more than 1, or overflows, equal ones still count as equal."""
    if magnitude > torch.finfo(dtype).max:
        pytest.skip(f"{dtype} does not reach {magnitude:g}")
    column = torch.arange(3000, device=device)
    high, low = (column % 7 == 3).to(dtype) * magnitude, torch.full((3000,), -magnitude, dtype=dtype, device=device)
    logits = torch.stack([high, -high, low, torch.where(column < 2000, low, high), torch.where(column < 9, -low, high)])
    labels = torch.tensor([3, 4, 5, 2995, 2000], device=device)
    ones = torch.ones(len(logits), device=device)
    ours = loss_and_gradient(lambda z: lk.fused_unlearning_loss(z, labels, 1.0, 1.0, reduction="none"), logits, ones)
    truth = loss_and_gradient(lambda z: eager_ihl(z, labels) + eager_cross_entropy(z, labels), logits.double(), ones)
    torch.testing.assert_close(ours[0].double(), truth[0], rtol=1e-6, atol=0)
    statistics = lk.target_statistics(logits, labels)
    without_two = logits.double().clone()
    rows = torch.arange(len(logits), device=device)
    without_two[rows, labels] = without_two[rows, statistics.runner_up_index] = -INF
    torch.testing.assert_close(statistics.rest.double(), without_two.logsumexp(1), rtol=1e-6, atol=1e-6)
    tied = (column % 7 == 3) & (column > 10)  # neither the target nor the runner-up
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(ours[1][0, tied].double(), truth[1][0, tied], rtol=2 * eps, atol=1e-12)
