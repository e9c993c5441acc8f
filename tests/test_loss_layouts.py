"""The losses from logits that lie in memory in any way, and that are written over."""

from __future__ import annotations

import pytest
import torch
from oracle import eager_ihl, loss_and_gradient, random_problem

import loku_kernels as lk

NAN = float("nan")


def _layouts(logits):
    """The same (3, 5, V) values as a slice of a batch, with V not last in memory, and with room between the rows."""
    batch, length, vocabulary = logits.shape
    longer = torch.full((batch, length + 1, vocabulary), NAN, dtype=logits.dtype, device=logits.device)
    longer[:, :-1] = logits
    spaced = torch.full((batch, length, vocabulary + 3), NAN, dtype=logits.dtype, device=logits.device)
    spaced[..., 1:-2] = logits
    return {
        "slice": longer[:, :-1],
        "transposed": logits.permute(2, 0, 1).contiguous().permute(1, 2, 0),
        "batch last": logits.transpose(0, 1).contiguous().transpose(0, 1),
        "spaced": spaced[..., 1:-2],
    }


@pytest.mark.parametrize("layout", ["slice", "transposed", "batch last", "spaced"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strides(backend, device, layout, dtype):
    logits, labels = random_problem(15, 777, dtype, device)
    logits, labels = logits.view(3, 5, -1), labels.view(3, 5)
    upstream = torch.rand(3, 5, device=device)
    expected = loss_and_gradient(lambda z: lk.fused_ihl(z, labels, reduction="none"), logits, upstream)
    view = _layouts(logits)[layout].detach().requires_grad_()
    assert not view.is_contiguous()
    loss = lk.fused_ihl(view, labels, reduction="none")
    (gradient,) = torch.autograd.grad(loss, view, upstream)
    # Where a row starts in memory may decide the order of its sum, but nothing else.
    torch.testing.assert_close(loss.double(), expected[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient.double(), expected[1], rtol=torch.finfo(dtype).eps + 2e-6, atol=1e-9)


def test_expanded_logits(backend, device):
    row = torch.randn(1, 1, 500, device=device, requires_grad=True)
    labels = torch.arange(6, device=device).view(2, 3)
    lk.fused_ihl(row.expand(2, 3, 500), labels, reduction="sum").backward()
    expanded = row.grad.clone()
    row.grad = None
    sum(lk.fused_ihl(row, labels[i : i + 1, j : j + 1]) for i in range(2) for j in range(3)).backward()
    torch.testing.assert_close(expanded, row.grad)


def test_offsets_beyond_32_bits(backend, device):
    """Two rows 2^31 elements apart, in memory that is mostly never touched."""
    memory = torch.empty(2**31 + 64, dtype=torch.bfloat16, device=device)
    logits = memory.as_strided((2, 1, 64), (2**31, 64, 1))
    logits.copy_(torch.randn(2, 1, 64))
    labels = torch.tensor([[3], [5]], device=device)
    loss = lk.fused_ihl(logits, labels, reduction="none")
    torch.testing.assert_close(loss, eager_ihl(logits.float(), labels), rtol=1e-5, atol=0)


@pytest.mark.parametrize("shape", [(), (7,), (2, 3), (2, 3, 4), (2, 1, 3, 2)])
def test_leading_shapes(backend, device, shape):
    logits = torch.randn(*shape, 90, device=device, requires_grad=True)
    labels = torch.randint(0, 90, shape, device=device)
    loss, statistics = lk.fused_ihl(logits, labels, reduction="none", return_statistics=True)
    assert loss.shape == shape and all(field.shape == shape for field in statistics)
    torch.testing.assert_close(loss, eager_ihl(logits, labels), rtol=1e-5, atol=1e-6)
    loss.sum().backward()
    assert logits.grad.shape == logits.shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_inplace_writes_the_gradient_over_the_logits(backend, device, dtype):
    values, labels = random_problem(6, 1003, dtype, device)
    z = values.clone().requires_grad_()
    lk.fused_ihl(z, labels).backward()
    leaf = values.clone().requires_grad_()
    logits = leaf * 1
    loss = lk.fused_ihl(logits, labels, inplace=True)
    assert torch.equal(logits, values)
    loss.backward(retain_graph=True)
    assert torch.equal(leaf.grad, z.grad) and torch.equal(logits, z.grad)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("unpack", [lambda tensor: tensor, lambda tensor: torch.empty_like(tensor).copy_(tensor)])
def test_inplace_under_hooks_of_saved_tensors(backend, device, unpack):
    """Under which autograd does not notice a second backward pass."""
    values, labels = random_problem(6, 1003, torch.float32, device)
    leaf = values.clone().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, unpack):
        loss = lk.fused_ihl(leaf * 1, labels, inplace=True)
    loss.backward(retain_graph=True)
    expected = values.clone().requires_grad_()
    lk.fused_ihl(expected, labels).backward()
    assert torch.equal(leaf.grad, expected.grad)
    with pytest.raises(RuntimeError, match="an earlier backward pass with inplace=True wrote over them"):
        loss.backward()


def test_inplace_stays_inside_a_view(backend, device):
    memory = torch.randn(4, 6, 130, device=device)
    before = memory.clone()
    labels = torch.randint(0, 100, (4, 5), device=device)
    view = memory[:, :5, 10:110]
    expected = loss_and_gradient(
        lambda z: lk.fused_ihl(z, labels, reduction="none"), view, torch.full((4, 5), 0.05, device=device)
    )[1]
    view.requires_grad_()
    lk.fused_ihl(view, labels, inplace=True).backward()
    torch.testing.assert_close(memory[:, :5, 10:110].detach().double(), expected, rtol=1e-6, atol=1e-12)
    outside = torch.ones_like(memory, dtype=torch.bool)
    outside[:, :5, 10:110] = False
    assert torch.equal(memory.detach()[outside], before[outside])
