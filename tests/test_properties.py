"""Structured random rows: few distinct values, extremes, ties, forbidden tokens, any vocabulary size."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import loku_kernels as lk

VALUES = st.sampled_from([-float("inf"), -3e4, -88.0, -17.5, -1.0, -1e-3, 0.0, 1e-3, 0.5, 12.0, 88.0, 100.0, 3e4])


@st.composite
def rows(draw):
    vocabulary = draw(st.integers(2, 70))
    logits = draw(st.lists(st.lists(VALUES, min_size=vocabulary, max_size=vocabulary), min_size=1, max_size=4))
    labels = draw(st.lists(st.integers(-1, vocabulary - 1), min_size=len(logits), max_size=len(logits)))
    for row in logits:
        row[draw(st.integers(0, vocabulary - 1))] = 0.25  # a row of nothing but -inf has no softmax
    return torch.tensor(logits), torch.tensor(labels)


@given(rows(), st.sampled_from([torch.float32, torch.bfloat16]), st.sampled_from([(1.0, 0.0), (0.0, 1.0), (0.5, -2.0)]))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_backend_agrees_with_float64(backend, device, problem, dtype, weights):
    if backend == "triton" and device.type == "cpu":
        pytest.skip("the interpreter is slow; the grid of test_losses covers it")
    logits, labels = problem[0].to(device, dtype), problem[1].to(device)
    results = []
    for z in (logits.requires_grad_(), logits.detach().double().requires_grad_()):
        loss, statistics = lk.fused_unlearning_loss(
            z, labels, *weights, ignore_index=-1, reduction="none", return_statistics=True
        )
        (gradient,) = torch.autograd.grad(loss.sum(), z)
        results.append((loss.double(), gradient.double(), statistics))
    (loss, gradient, statistics), (true_loss, true_gradient, true_statistics) = results
    torch.testing.assert_close(loss, true_loss, rtol=3e-6, atol=1e-30)
    torch.testing.assert_close(gradient, true_gradient, rtol=torch.finfo(dtype).eps + 2e-5, atol=1e-37)
    assert torch.equal(statistics.runner_up_index, true_statistics.runner_up_index)
    assert torch.equal(statistics.correct, true_statistics.correct)
