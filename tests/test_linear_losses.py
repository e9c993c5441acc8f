"""The losses from hidden states, on every backend, against eager torch in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from oracle import DTYPES, VOCABULARIES, assert_no_worse, eager_loss

import loku_kernels as lk
from loku_kernels import gemm

NAN = float("nan")


def problem(rows, size, vocabulary, dtype, device, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, size, generator=generator)
    weight = torch.randn(vocabulary, size, generator=generator) * 2 / size**0.5
    bias = torch.randn(vocabulary, generator=generator)
    labels = torch.randint(0, vocabulary, (rows,), generator=generator)
    labels[1::4] = -100
    return hidden.to(device, dtype), weight.to(device, dtype), bias.to(device, dtype), labels.to(device)


def gradients(loss, *tensors):
    """Loss and the gradients of those of ``tensors`` that require one, in float64."""
    wanted = [tensor for tensor in tensors if tensor.requires_grad]
    value = loss(*tensors)
    return value.detach().double(), [g.double() for g in torch.autograd.grad(value, wanted)]


def leaves(tensors, requires_grad, dtype=None):
    return [
        tensor.to(dtype or tensor.dtype).clone().requires_grad_(needed)
        for tensor, needed in zip(tensors, requires_grad, strict=True)
    ]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_frozen_head_is_no_worse_than_eager(backend, device, dtype, vocabulary):
    hidden, weight, bias, labels = problem(16, 16, vocabulary, dtype, device)
    ihl_weight = torch.tensor([1.0, 0.0, 0.5, 1.0], device=device).repeat(4)
    ce_weight = torch.tensor([0.0, 1.0, 2.0, -1.0], device=device).repeat(4)
    # MKL sums products whose height is no multiple of 4 far less accurately, so chunks of 4 rows for a fair comparison.
    chunk_bytes = 4 * vocabulary * dtype.itemsize

    def ours(h, w, b):
        return lk.fused_linear_unlearning_loss(
            h, w, labels, ihl_weight, ce_weight, bias=b, reduction="sum", chunk_bytes=chunk_bytes
        )

    def eager(h, w, b):
        logits = torch.nn.functional.linear(h, w, b)
        return eager_loss(logits, labels, ihl_weight.to(h.dtype), ce_weight.to(h.dtype)).sum()

    tensors, frozen = (hidden, weight, bias), (True, False, False)
    loss, (gradient,) = gradients(ours, *leaves(tensors, frozen))
    eager_value, (eager_gradient,) = gradients(eager, *leaves(tensors, frozen))
    truth, (true_gradient,) = gradients(eager, *leaves(tensors, frozen, torch.float64))
    assert_no_worse(loss, eager_value, truth, dtype, "loss", slack=3)
    assert_no_worse(gradient, eager_gradient, true_gradient, dtype, "gradient", slack=3)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("requires_grad", list(itertools.product([True, False], repeat=3)), ids=str)
def test_every_combination_of_requires_grad(backend, device, requires_grad, reduction):
    tensors = problem(9, 8, 301, torch.float32, device)
    labels = tensors[3]
    upstream = torch.linspace(-1, 2, 9, device=device)
    counted = (labels >= 0).sum()

    def ours(h, w, b):
        loss = lk.fused_linear_ihl(h, w, labels, bias=b, reduction=reduction, chunk_bytes=301 * 4 * 3)
        return (loss * upstream).sum() if reduction == "none" else -1.5 * loss

    def eager(h, w, b):
        one, zero = torch.ones((), device=device), torch.zeros((), device=device)
        rows = eager_loss(torch.nn.functional.linear(h, w, b), labels, one, zero)
        if reduction == "none":
            return (rows * upstream).sum()
        return -1.5 * rows.sum() / (counted if reduction == "mean" else 1)

    inputs = leaves(tensors[:3], requires_grad)
    if not any(requires_grad):
        assert not ours(*inputs).requires_grad
        return
    loss, found = gradients(ours, *inputs)
    truth, expected = gradients(eager, *leaves(tensors[:3], requires_grad, torch.float64))
    torch.testing.assert_close(loss, truth, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_trained_head_sums_in_float32(backend, device, dtype):
    """240 rows in chunks of four: sums kept in 16 bits would lose much of the later rows."""
    hidden, weight, bias, labels = problem(240, 8, 50, dtype, device)

    def ours(h, w, b):
        return lk.fused_linear_cross_entropy(h, w, labels, bias=b, reduction="sum", chunk_bytes=50 * 2 * 4)

    def eager(h, w, b):
        logits = torch.nn.functional.linear(h, w, b)
        return torch.nn.functional.cross_entropy(logits, labels, reduction="sum")

    inputs = (hidden, weight, bias)
    _, found = gradients(ours, *leaves(inputs, (True,) * 3))
    _, in_dtype = gradients(eager, *leaves(inputs, (True,) * 3))
    _, truth = gradients(eager, *leaves(inputs, (True,) * 3, torch.float64))
    for name, ours_, eager_, true_ in zip(("hidden", "weight", "bias"), found, in_dtype, truth, strict=True):
        assert_no_worse(ours_, eager_, true_, dtype, name, slack=1.5)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_chunk_size_does_not_matter(backend, device, reduction):
    hidden, weight, bias, labels = problem(37, 8, 301, torch.float32, device)

    def run(chunk_bytes):
        inputs = leaves((hidden, weight, bias), (True, True, True))
        loss = lk.fused_linear_unlearning_loss(
            inputs[0], inputs[1], labels, 1.0, 0.5, bias=inputs[2], reduction=reduction, chunk_bytes=chunk_bytes
        )
        return [loss.detach(), *torch.autograd.grad(loss, inputs, torch.ones_like(loss))]

    whole = run(None)
    for rows in (1, 5, 16, 36):
        torch.testing.assert_close(run(301 * 4 * rows), whole, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(run(1), whole, rtol=1e-5, atol=1e-6)  # less than a row: a row at a time


@pytest.mark.parametrize("trained", [False, True])
def test_ignored_rows_never_reach_the_head(backend, device, trained):
    """Ignored rows of NaN would spoil whatever they touched. On a GPU the caller names the rows that count."""
    hidden, weight, _, labels = problem(12, 8, 301, torch.float32, device)
    clean = hidden.clone()
    hidden[labels < 0] = NAN
    rows = torch.tensor([i for i in range(12) if i % 4 != 1], device=device)
    for given in [rows] + [None] * (device.type == "cpu"):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_(trained)
        loss, statistics = lk.fused_linear_ihl(h, w, labels, rows=given, return_statistics=True)
        loss.backward()
        h0, w0 = clean.clone().requires_grad_(), weight.clone().requires_grad_(trained)
        expected = lk.fused_linear_ihl(h0, w0, labels, chunk_bytes=301 * 4)
        expected.backward()
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(h.grad, h0.grad, rtol=1e-4, atol=1e-7)
        assert not h.grad[labels < 0].any() and not statistics.loss[labels < 0].any()
        if trained:
            torch.testing.assert_close(w.grad, w0.grad, rtol=1e-4, atol=1e-7)


def test_rows_in_any_order(backend, device):
    hidden, weight, _, labels = problem(12, 8, 301, torch.float32, device)
    rows = torch.tensor([i for i in range(12) if i % 4 != 1], device=device)
    loss, statistics = lk.fused_linear_ihl(hidden, weight, labels, rows=rows.flip(0), return_statistics=True)
    expected, expected_statistics = lk.fused_linear_ihl(hidden, weight, labels, return_statistics=True)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(statistics.loss, expected_statistics.loss)


@pytest.mark.parametrize("rows", [0, 5])
def test_nothing_counts(backend, device, rows):
    hidden = torch.randn(rows, 8, device=device, requires_grad=True)
    weight = torch.randn(30, 8, device=device, requires_grad=True)
    labels = torch.full((rows,), -100, device=device)
    loss = lk.fused_linear_cross_entropy(hidden, weight, labels)
    loss.backward()
    assert loss.item() == 0.0 and not hidden.grad.any() and not weight.grad.any()


def test_repeated_backward(backend, device):
    hidden, weight, _, labels = problem(12, 8, 301, torch.float32, device)
    h, w = hidden.requires_grad_(), weight.requires_grad_()
    for reduction in ("mean", "none"):
        loss = lk.fused_linear_ihl(h, w, labels, reduction=reduction).sum()
        once = torch.autograd.grad(loss, (h, w), retain_graph=True)
        doubled = torch.autograd.grad(loss, (h, w), torch.tensor(2.0, device=device), retain_graph=True)
        again = torch.autograd.grad(loss, (h, w))
        assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
        torch.testing.assert_close(doubled, tuple(2 * g for g in once))


def test_without_gradients_only_the_losses_are_computed(backend, device, monkeypatch):
    hidden, weight, _, labels = problem(12, 8, 301, torch.float32, device)
    expected = lk.fused_linear_ihl(hidden.clone().requires_grad_(), weight, labels)

    def forbidden(*_):
        raise AssertionError("a product for a gradient that nobody asked for")

    monkeypatch.setattr(gemm, "mm", forbidden)
    monkeypatch.setattr(gemm, "add_outer_", forbidden)
    with torch.no_grad():
        torch.testing.assert_close(lk.fused_linear_ihl(hidden.requires_grad_(), weight, labels), expected.detach())
    lk.fused_linear_ihl(hidden.detach(), weight.detach(), labels)


def test_inputs_are_left_alone(backend, device):
    tensors = problem(12, 8, 301, torch.float32, device)
    before = [tensor.clone() for tensor in tensors]
    hidden, weight, bias, labels = tensors
    lk.fused_linear_ihl(hidden.requires_grad_(), weight, labels, bias=bias).backward()
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


@pytest.mark.parametrize("shape", [(4, 7), (2, 2, 7)])
def test_leading_shapes_shift_and_strides(backend, device, shape):
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(*shape, 24, generator=generator).to(device)[..., ::2].requires_grad_()
    weight = torch.randn(24, 90, generator=generator).to(device)[::2].t()
    labels = torch.randint(0, 90, shape, generator=generator).to(device)
    loss = lk.fused_linear_cross_entropy(hidden, weight, labels, shift_labels=True)
    (gradient,) = torch.autograd.grad(loss, hidden)
    logits = hidden @ weight.t()
    expected = torch.nn.functional.cross_entropy(logits[..., :-1, :].reshape(-1, 90), labels[..., 1:].reshape(-1))
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, hidden)[0], rtol=1e-4, atol=1e-7)


def test_scale_and_soft_cap(backend, device):
    hidden, weight, bias, labels = problem(9, 8, 301, torch.float32, device)

    def capped(h, w, b):
        return 4 * torch.tanh(0.7 * torch.nn.functional.linear(h, w, b) / 4)

    def ours(h, w, b):
        return lk.fused_linear_cross_entropy(h, w, labels, bias=b, logit_scale=0.7, logit_softcap=4.0)

    def eager(h, w, b):
        return torch.nn.functional.cross_entropy(capped(h, w, b), labels)

    inputs = (hidden, weight, bias)
    loss, found = gradients(ours, *leaves(inputs, (True,) * 3))
    truth, expected = gradients(eager, *leaves(inputs, (True,) * 3, torch.float64))
    torch.testing.assert_close(loss, truth, rtol=1e-5, atol=0)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("loss", [lk.fused_linear_ihl, lk.fused_linear_cross_entropy])
def test_float16_keeps_the_gradient_of_memorised_rows_under_a_loss_scaler(backend, device, loss, reduction):
    """1 - p_t near 1e-8, less than float16 can hold."""
    rows, size, vocabulary, scale = 8, 32, 1000, 65536.0
    labels = torch.arange(rows, device=device)
    weight = 0.3 * torch.randn(vocabulary, size, generator=torch.Generator().manual_seed(0))
    weight[:rows] = 4 * torch.eye(rows, size)
    hidden = 7 * torch.eye(rows, size)

    def gradient(dtype, scale):
        h = hidden.to(device, dtype).requires_grad_()
        (scale * loss(h, weight.half().to(device, dtype), labels, reduction=reduction).sum()).backward()
        return h.grad.double() / scale

    expected = gradient(torch.float64, 1.0)
    assert 0 < expected.abs().max() < 6e-8
    assert (gradient(torch.float16, scale) - expected).norm() <= 0.01 * expected.norm()


def test_autocast_casts_as_a_linear_layer_does(backend, device):
    hidden, weight, _, labels = problem(9, 8, 301, torch.float32, device)
    h = hidden.clone().requires_grad_()
    with torch.autocast(device.type, dtype=torch.bfloat16):
        loss = lk.fused_linear_ihl(h, weight, labels)
    loss.backward()
    expected = lk.fused_linear_ihl(hidden.bfloat16(), weight.bfloat16(), labels)
    assert loss.dtype == torch.float32 and h.grad.dtype == torch.float32
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("trained", [False, True])
def test_a_backward_pass_under_another_autocast(backend, device, trained):
    """Products are formed in the dtypes of the forward pass, with some labels ignored."""
    hidden, weight, _, labels = problem(9, 8, 301, torch.float32, device)
    labels[2] = -100

    def gradients(**autocast):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_(trained)
        rows = lk.fused_linear_ihl(h, w, labels, reduction="none")
        total = rows.sum() + lk.linear_target_statistics(h, w, labels).log_probability.sum()
        with torch.autocast(device.type, dtype=torch.bfloat16, **autocast):
            return torch.autograd.grad(total, [h, w] if trained else [h])

    torch.testing.assert_close(gradients(), gradients(enabled=False), rtol=0, atol=0)


@pytest.mark.parametrize("trained", [False, True])
def test_ignored_rows_have_no_gradient_whatever_comes_upstream(backend, device, trained):
    hidden, weight, _, labels = problem(4, 8, 301, torch.float32, device)
    labels[1] = -100
    h = hidden.clone().requires_grad_()
    rows = lk.fused_linear_ihl(h, weight.requires_grad_(trained), labels, reduction="none")
    upstream = torch.tensor([1.0, float("nan"), 2.0, float("inf")], device=device)
    (gradient,) = torch.autograd.grad(rows, h, upstream)
    assert (gradient[1] == 0).all() and gradient[[0, 2]].isfinite().all()


def test_tensors_without_memory():
    hidden, weight, labels = (
        torch.empty(3, 8, device="meta"),
        torch.empty(9, 8, device="meta"),
        torch.empty(3, device="meta"),
    )
    assert lk.fused_linear_ihl(hidden, weight, labels.long()).is_meta
    assert lk.linear_target_statistics(hidden, weight, labels.long()).rest.shape == (3,)


@pytest.mark.parametrize("trained", [False, True])
def test_statistics_from_hidden_states(backend, device, trained):
    hidden, weight, bias, labels = problem(9, 8, 301, torch.float32, device)
    coefficients = torch.randn(3, 9, device=device)

    def combined(statistics):
        return sum((c * s).sum() for c, s in zip(coefficients, statistics, strict=True))

    def ours(h, w, b):
        s = lk.linear_target_statistics(h, w, labels, bias=b, chunk_bytes=301 * 4 * 2)
        return combined((s.target, s.runner_up, s.rest))

    def eager(h, w, b):
        logits = torch.nn.functional.linear(h, w, b)
        column = labels.clamp(min=0)[:, None]
        others = logits.scatter(1, column, -float("inf"))
        runner_up, index = others.max(1)
        rest = others.scatter(1, index[:, None], -float("inf")).logsumexp(1)
        counted = labels >= 0
        return combined([torch.where(counted, x, 0.0) for x in (logits.gather(1, column)[:, 0], runner_up, rest)])

    needed = (True, trained, trained)
    value, found = gradients(ours, *leaves((hidden, weight, bias), needed))
    truth, expected = gradients(eager, *leaves((hidden, weight, bias), needed, torch.float64))
    torch.testing.assert_close(value, truth, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
