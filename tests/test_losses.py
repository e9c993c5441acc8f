"""The losses from logits, on every backend, against eager torch in float64."""

from __future__ import annotations

import math
from decimal import Decimal, localcontext

import pytest
import torch
from oracle import (
    DTYPES,
    VOCABULARIES,
    assert_no_worse,
    eager_ihl,
    eager_loss,
    loss_and_gradient,
    random_problem,
)

import loku_kernels as lk
from loku_kernels.backends import select
from loku_kernels.backends.weights import RowWeights

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_loss_and_gradient_are_no_worse_than_eager(backend, device, dtype, vocabulary):
    logits, labels = random_problem(5, vocabulary, dtype, device)
    ihl_weight = torch.tensor([1.0, 1.0, 0.5, 0.0, 1.0], device=device)
    ce_weight = torch.tensor([0.0, 1.0, 2.0, -1.0, 0.25], device=device)
    upstream = torch.tensor([1.0, 3.0, -2.0, 0.5, 7.0], device=device)

    def ours(z):
        return lk.fused_unlearning_loss(z, labels, ihl_weight, ce_weight, reduction="none")

    def eager(z):
        return eager_loss(z, labels, ihl_weight.to(z.dtype), ce_weight.to(z.dtype))

    before = logits.clone()
    loss, gradient = loss_and_gradient(ours, logits, upstream)
    assert torch.equal(logits, before)
    eager_rows, eager_gradient = loss_and_gradient(eager, logits, upstream)
    true_rows, true_gradient = loss_and_gradient(eager, logits.double(), upstream.double())
    assert_no_worse(loss, eager_rows, true_rows, torch.float32, "loss")
    assert_no_worse(gradient, eager_gradient, true_gradient, dtype, "gradient")
    assert loss[1] == 0 and not gradient[1].any()


@pytest.mark.parametrize("offset", [0.0, 100.0, -100.0])
@pytest.mark.parametrize("exponent", [1, 3, 6, 9, 12])
@pytest.mark.parametrize("leader", ["target", "runner_up"])
def test_rows_within_rounding_of_certainty(backend, device, leader, exponent, offset):
    """Where p_t, or p_m, is 1 - 10^-exponent, float32 keeps a relative error under 1e-5; eager has no digit left."""
    vocabulary, target, runner_up = 50, 7, 31
    logits = torch.linspace(-1.5, 0.5, vocabulary) + offset
    logits[target], logits[runner_up] = 0.75 + offset, 1.0 + offset
    leading, trailing = (target, runner_up) if leader == "target" else (runner_up, target)
    logits[leading] = math.log(10**exponent) + math.log(vocabulary / 2) + offset
    exact_loss, exact_gradient = _exact_ihl(logits, target)

    z = logits.to(device).requires_grad_()
    loss = lk.fused_ihl(z, torch.tensor(target, device=device))
    loss.backward()
    gradient = z.grad.cpu().double()
    scale = exact_gradient.abs().max()
    assert ((gradient - exact_gradient).abs().max() / scale).item() < 1e-5
    for column in (leading, trailing):
        assert gradient[column].item() == pytest.approx(exact_gradient[column].item(), rel=1e-5)
    if leader == "runner_up":  # the loss itself is then as small as the gradient
        assert loss.item() == pytest.approx(exact_loss, rel=1e-5)


def _exact_ihl(logits, target):
    """Loss and gradient of one row in 60-digit arithmetic, from the textbook formulas."""
    with localcontext() as context:
        context.prec = 60
        exponentials = [Decimal(z).exp() for z in logits.tolist()]
        total = sum(exponentials)
        p = [e / total for e in exponentials]
        others = [v for v in range(len(p)) if v != target]
        m = max(others, key=lambda v: p[v])
        gradient = [q * (p[m] - p[target]) for q in p]
        gradient[target] = p[target] * (1 - p[target] + p[m])
        gradient[m] = -p[m] * (1 + p[target] - p[m])
        return float(1 + p[target] - p[m]), torch.tensor([float(g) for g in gradient], dtype=torch.float64)


def test_reference_in_float64_is_exact():
    logits = torch.randn(31, generator=torch.Generator().manual_seed(3), dtype=torch.float64) * 8
    loss, gradient = _exact_ihl(logits, 4)
    z = logits.clone().requires_grad_()
    ours = lk.fused_ihl(z, torch.tensor(4))
    ours.backward()
    assert ours.item() == pytest.approx(loss, rel=1e-14)
    torch.testing.assert_close(z.grad, gradient, rtol=1e-13, atol=1e-18)


def test_gradient_sums_to_zero_and_loss_is_bounded(backend, device):
    logits, labels = random_problem(32, 5000, torch.float32, device, spread=6.0)
    z = logits.requires_grad_()
    loss = lk.fused_ihl(z, labels, reduction="none")
    loss.sum().backward()
    assert z.grad.double().sum(dim=1).abs().max() < 1e-6
    assert ((loss > 0) & (loss < 2))[labels >= 0].all()


def test_everything_ignored(backend, device):
    logits = torch.full((2, 3, 40), NAN, device=device, requires_grad=True)  # ignored rows are not read
    labels = torch.full((2, 3), -100, device=device)
    loss = lk.fused_ihl(logits, labels)
    loss.backward()
    assert loss.item() == 0.0 and torch.equal(logits.grad, torch.zeros_like(logits))


def test_no_rows_of_elements_that_are_not_adjacent(backend, device):
    logits = torch.randn(4, 7, 6, device=device)[..., ::2][:0].requires_grad_()
    loss = lk.fused_ihl(logits, torch.zeros(0, 7, dtype=torch.int64, device=device))
    loss.backward()
    assert loss == 0 and logits.grad.shape == (0, 7, 3)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_empty(backend, device, reduction):
    logits = torch.empty(0, 5, 40, device=device, requires_grad=True)
    loss = lk.fused_cross_entropy(logits, torch.empty(0, 5, dtype=torch.int64, device=device), reduction=reduction)
    loss.sum().backward()
    assert loss.shape == ((0, 5) if reduction == "none" else ()) and loss.sum() == 0
    assert logits.grad.shape == logits.shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, 30.0), (0.0625, None), (1.7, 5.0), (1.0, 0.5)])
def test_scale_and_soft_cap(backend, device, dtype, scale, softcap):
    logits, labels = random_problem(5, 3001, dtype, device, spread=8.0)

    def transformed(z):
        z = z * scale
        return z if softcap is None else softcap * torch.tanh(z / softcap)

    ones = torch.ones(5, device=device)
    weights = (torch.full((5,), 1.0, device=device), torch.full((5,), 0.5, device=device))
    ours = loss_and_gradient(
        lambda z: lk.fused_unlearning_loss(
            z, labels, 1.0, 0.5, reduction="none", logit_scale=scale, logit_softcap=softcap
        ),
        logits,
        ones,
    )
    eager = loss_and_gradient(lambda z: eager_loss(transformed(z.float()), labels, *weights), logits, ones)
    truth = loss_and_gradient(lambda z: eager_loss(transformed(z), labels, *weights), logits.double(), ones)
    assert_no_worse(ours[0], eager[0], truth[0], torch.float32, "loss")
    assert_no_worse(ours[1], eager[1], truth[1], dtype, "gradient")


@pytest.mark.parametrize("integer", [torch.int32, torch.uint8])
def test_label_dtypes(backend, device, integer):
    logits, labels = random_problem(4, 100, torch.float32, device)
    labels = labels.clamp(min=0)
    assert lk.fused_ihl(logits, labels.to(integer)).equal(lk.fused_ihl(logits, labels))


def test_upstream_gradients_and_repeated_backward(backend, device):
    logits, labels = random_problem(6, 333, torch.float32, device)
    z = logits.clone().requires_grad_()
    loss = lk.fused_ihl(z, labels)
    (once,) = torch.autograd.grad(loss, z, retain_graph=True)
    (scaled,) = torch.autograd.grad(loss, z, torch.tensor(-2.5, device=device), retain_graph=True)
    (again,) = torch.autograd.grad(loss, z)
    assert torch.equal(once, again)
    torch.testing.assert_close(scaled, -2.5 * once)


def test_bitwise_deterministic(backend, device):
    logits, labels = random_problem(40, 3001, torch.bfloat16, device)

    def run():
        z = logits.clone().requires_grad_()
        loss = lk.fused_unlearning_loss(z, labels, 1.0, 0.3)
        loss.backward()
        return loss, z.grad

    first, second = run(), run()
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


@pytest.mark.parametrize("column", [-1, 40, 10**12, -(10**12)])
def test_labels_outside_the_vocabulary_are_nan_in_the_kernels(backend, device, column):
    """Where labels cannot be checked first: a row of NaN, its neighbours untouched, no access out of bounds."""
    kernels = select(torch.empty(0, device=device))
    logits = torch.randn(1, 3, 40, device=device)
    labels = torch.tensor([4, column, 5], device=device)
    one, both = torch.ones(3, device=device), RowWeights(None, 1.0, None, 1.0)
    settings = {"ignore_index": -100, "scale": 1.0, "softcap": 0.0}
    rows, index = kernels.row_losses(logits, labels, both, **settings)
    assert rows.isnan().any(dim=0).tolist() == [False, True, False] and rows[:, 1].isnan().all()
    assert index[1] == -1
    out = torch.zeros_like(logits)
    kernels.row_gradient(logits, labels, index, rows[3:], one, out, **settings)
    assert out.isnan().all(dim=2).tolist() == [[False, True, False]] and out.isnan().sum() == 40
    fused = logits.clone()
    fused_rows, fused_index = kernels.row_losses_and_gradient_(fused, labels, both, **settings)
    torch.testing.assert_close(fused_rows, rows, equal_nan=True)
    torch.testing.assert_close(fused, out, equal_nan=True)
    assert torch.equal(fused_index, index)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocabulary", [2, 31, 50257])
def test_fused_kernel_equals_the_two_it_joins(backend, device, dtype, vocabulary):
    kernels = select(torch.empty(0, device=device))
    logits, labels = random_problem(5, vocabulary, dtype, device)
    logits = logits[None]
    one, weights = torch.ones(5, device=device), RowWeights(torch.linspace(-1, 1, 5, device=device), 0.5, None, -2.0)
    settings = {"ignore_index": -100, "scale": 0.5, "softcap": 20.0}
    rows, index = kernels.row_losses(logits, labels, weights, **settings)
    out = torch.full_like(logits, NAN)
    kernels.row_gradient(logits, labels, index, rows[3:], one, out, **settings)
    fused = logits.clone()
    fused_rows, fused_index = kernels.row_losses_and_gradient_(fused, labels, weights, **settings)
    assert torch.equal(fused_index, index)
    torch.testing.assert_close(fused_rows, rows, rtol=2e-6, atol=1e-7)
    torch.testing.assert_close(fused, out, rtol=2 * torch.finfo(dtype).eps + 4e-6, atol=1e-7)


def test_statistics(backend, device):
    logits, labels = random_problem(6, 1000, torch.float32, device)
    loss, statistics = lk.fused_cross_entropy(logits, labels, return_statistics=True)
    counted = labels >= 0
    probabilities = logits.double().softmax(dim=1)
    others = probabilities.scatter(1, labels.clamp(min=0)[:, None], -1.0)
    torch.testing.assert_close(
        statistics.target_probability[counted].double(),
        probabilities.gather(1, labels.clamp(min=0)[:, None])[counted, 0],
        rtol=2e-6,
        atol=0,
    )
    torch.testing.assert_close(
        statistics.runner_up_probability[counted].double(), others.amax(1)[counted], rtol=2e-6, atol=0
    )
    assert torch.equal(statistics.runner_up_index[counted], others.argmax(1)[counted])
    assert torch.equal(statistics.correct, logits.argmax(1) == labels)
    torch.testing.assert_close(loss, statistics.loss.sum() / counted.sum())
    assert [field[1].item() for field in statistics] == [0.0, 0.0, 0.0, -1, False]
    assert not any(field.requires_grad for field in statistics)


def test_shifted_labels(backend, device):
    logits = torch.randn(2, 6, 50, device=device, requires_grad=True)
    labels = torch.randint(0, 50, (2, 6), device=device)
    labels[0, 3] = -100
    shifted = lk.fused_cross_entropy(logits, labels, shift_labels=True)
    (gradient,) = torch.autograd.grad(shifted, logits)
    plain = torch.nn.functional.cross_entropy(logits[:, :-1].reshape(-1, 50), labels[:, 1:].reshape(-1))
    (expected,) = torch.autograd.grad(plain, logits)
    torch.testing.assert_close(shifted, plain)
    torch.testing.assert_close(gradient, expected)
    small = labels.clamp(min=0).to(torch.uint8)  # which cannot hold -100
    same = lk.fused_cross_entropy(logits, small, shift_labels=True)
    torch.testing.assert_close(same, lk.fused_cross_entropy(logits, small.long(), shift_labels=True))
    for reduction in ("none", "sum", "mean"):
        empty = lk.fused_cross_entropy(logits[:, :0], labels[:, :0], shift_labels=True, reduction=reduction)
        assert not empty.any()
        assert empty.shape == ((2, 0) if reduction == "none" else ())


def test_normalisers(backend, device):
    logits, labels = random_problem(6, 50, torch.float32, device)
    rows = lk.fused_ihl(logits, labels, reduction="none")
    assert lk.fused_ihl(logits, labels).item() == pytest.approx(rows.sum().item() / 5)
    assert lk.fused_ihl(logits, labels, reduction="sum").item() == pytest.approx(rows.sum().item())
    for count in (20, torch.tensor(20, device=device), torch.tensor(20.0, dtype=torch.float64, device=device)):
        loss = lk.fused_ihl(logits, labels, num_items_in_batch=count)
        assert loss.dtype == torch.float32 and loss.item() == pytest.approx(rows.sum().item() / 20)
    for nothing in (0, torch.tensor(0, device=device)):  # as Trainer passes it where every label is ignored
        hidden = torch.randn(6, 4, device=device, requires_grad=True)
        ignored = torch.full_like(labels, -100)
        loss = lk.fused_linear_ihl(hidden, torch.randn(50, 4, device=device), ignored, num_items_in_batch=nothing)
        (gradient,) = torch.autograd.grad(loss, hidden)
        assert loss == 0
        assert not gradient.any()


def test_other_ignore_index(backend, device):
    logits, labels = random_problem(6, 50, torch.float32, device)
    labels = labels.clamp(min=0)
    rows = lk.fused_ihl(logits, labels, reduction="none", ignore_index=int(labels[4]))
    expected = torch.where(labels == labels[4], 0.0, eager_ihl(logits, labels))
    torch.testing.assert_close(rows, expected, rtol=1e-5, atol=1e-6)


def test_gradient_ascent_is_the_negative(backend, device):
    logits, labels = random_problem(6, 50, torch.float32, device)
    down, up = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    lk.fused_cross_entropy(down, labels).backward()
    lk.fused_unlearning_loss(up, labels, 0.0, -1.0).backward()
    torch.testing.assert_close(up.grad, -down.grad)


def test_weight_zero_drops_an_infinite_loss(backend, device):
    logits = torch.zeros(1, 10, device=device)
    logits[0, 4] = -INF
    label = torch.tensor([4], device=device)
    assert lk.fused_unlearning_loss(logits, label, 1.0, 0.0).item() == pytest.approx(1 - 1 / 9)
    assert lk.fused_unlearning_loss(logits, label, 1.0, 1.0).item() == INF
