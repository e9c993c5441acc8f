"""The differentiable primitive, and losses of the literature written as a line of torch on it."""

from __future__ import annotations

import math

import pytest
import torch
from oracle import random_problem
from torch.nn.functional import logsigmoid

import loku_kernels as lk


def eager_statistics(logits, labels):
    column = labels.clamp(min=0)[:, None]
    others = logits.scatter(1, column, -float("inf"))
    runner_up, index = others.max(dim=1)
    rest = others.scatter(1, index[:, None], -float("inf")).logsumexp(dim=1)
    return logits.gather(1, column)[:, 0], runner_up, index, rest


def test_values(backend, device):
    logits, labels = random_problem(6, 1003, torch.float32, device)
    found = lk.target_statistics(logits, labels)
    expected = eager_statistics(logits.double(), labels)
    counted = labels >= 0
    for name, value in zip(("target", "runner_up", "runner_up_index", "rest"), expected, strict=True):
        ours = getattr(found, name)[counted]
        torch.testing.assert_close(ours.to(value.dtype), value[counted], rtol=1e-6, atol=1e-6, msg=name)
    assert [field[1].item() for field in found] == [0.0, 0.0, -1, 0.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients(backend, device, dtype):
    logits, labels = random_problem(6, 1003, dtype, device)
    labels = labels.clamp(min=0)
    weights = torch.randn(3, 6, device=device)
    z, exact = logits.clone().requires_grad_(), logits.double().requires_grad_()
    ours, truth = lk.target_statistics(z, labels), eager_statistics(exact, labels)
    sum((w * s).sum() for w, s in zip(weights, (ours.target, ours.runner_up, ours.rest), strict=True)).backward()
    sum((w * s).sum() for w, s in zip(weights, (truth[0], truth[1], truth[3]), strict=True)).backward()
    torch.testing.assert_close(z.grad.double(), exact.grad, rtol=2 * torch.finfo(dtype).eps + 2e-6, atol=1e-7)


@pytest.mark.parametrize("vocabulary", [2, 3])
def test_no_rest(backend, device, vocabulary):
    """With two tokens nothing is left over; a third that is forbidden leaves as little."""
    logits = torch.tensor([[1.0, 2.0, -float("inf")]], device=device)[:, :vocabulary].requires_grad_()
    statistics = lk.target_statistics(logits, torch.tensor([0], device=device))
    assert statistics.rest.item() == -float("inf")
    (gradient,) = torch.autograd.grad(
        torch.logaddexp(statistics.runner_up, statistics.rest) - statistics.target, logits
    )
    assert gradient[0].tolist() == [-1.0, 1.0, 0.0][:vocabulary]


def test_a_rest_that_is_next_to_nothing(backend, device):
    """Its gradient is exp(z_v - rest), of ordinary size however far below the runner-up all of it lies."""
    logits = torch.tensor([[0.0, 0.0, -80.0, -80.0, -85.0]], device=device, requires_grad=True)
    statistics = lk.target_statistics(logits, torch.tensor([0], device=device))
    (gradient,) = torch.autograd.grad(65536 * statistics.rest.sum(), logits)
    rest = logits.detach()[0, 2:].double()
    assert statistics.rest.item() == pytest.approx(rest.logsumexp(0).item(), rel=1e-6)
    torch.testing.assert_close(gradient[0, 2:].double(), 65536 * rest.softmax(0), rtol=2e-5, atol=0)
    assert gradient[0, :2].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_log_probability(backend, device, dtype):
    """Also of a token that all others are forbidden beside, of an ignored one, and of one with 1 - p of e^-20."""
    logits, labels = random_problem(6, 500, dtype, device)
    logits[3, labels[3]] = logits[3].max() + 20 + math.log(500)
    logits[2] = logits[2].masked_fill(torch.arange(500, device=device) != labels[2], -float("inf"))
    z, exact = logits.clone().requires_grad_(), logits.double().requires_grad_()
    ours = lk.target_statistics(z, labels).log_probability
    truth = exact.log_softmax(1).gather(1, labels.clamp(min=0)[:, None])[:, 0].masked_fill(labels < 0, 0.0)
    ours.sum().backward()
    truth.sum().backward()
    torch.testing.assert_close(ours.double(), truth, rtol=1e-6, atol=1e-12)
    assert ours[labels < 0].tolist() == [0.0]
    torch.testing.assert_close(z.grad.double(), exact.grad, rtol=2 * torch.finfo(dtype).eps + 5e-6, atol=1e-8)
    z = logits[[0, 2, 3]].clone()
    z[0], z[1, 7], z[2, labels[3]] = float("nan"), float("nan"), float("nan")
    assert lk.target_statistics(z, labels[[0, 2, 3]]).log_probability.isnan().all()


LOSSES = {
    # arXiv 2404.05868, equation 3, with one token a sequence: -2/beta E log sigmoid(-beta log(p / p_reference))
    "npo": lambda log_p: -(2 / 0.1) * logsigmoid(-0.1 * (log_p + 1.5)).mean(),
    # arXiv 2410.07163, equation 4
    "simnpo": lambda log_p: -(2 / 2.5) * logsigmoid(-2.5 * log_p - 0.0).mean(),
    # weighted gradient ascent, arXiv 2502.19301: p^alpha log p
    "wga": lambda log_p: (log_p.detach().exp() ** 0.5 * log_p).mean(),
    "cross entropy": lambda log_p: -log_p.mean(),
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses_in_a_line(backend, device, name):
    logits, labels = random_problem(6, 500, torch.float32, device)
    labels = labels.clamp(min=0)
    z, exact = logits.clone().requires_grad_(), logits.double().requires_grad_()
    loss = LOSSES[name](lk.target_statistics(z, labels).log_probability)
    truth = LOSSES[name](exact.log_softmax(1).gather(1, labels[:, None])[:, 0])
    loss.backward()
    truth.backward()
    torch.testing.assert_close(loss.double(), truth, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(z.grad.double(), exact.grad, rtol=2e-5, atol=1e-8)
