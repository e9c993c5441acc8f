"""What torch asks of an operator: gradcheck, opcheck, torch.compile without a graph break, no double backward."""

from __future__ import annotations

import pytest
import torch

import loku_kernels as lk
from loku_kernels import ops
from loku_kernels.ops import linear, logits


@pytest.fixture
def double_problem():
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(2, 3, 7, dtype=torch.float64, generator=generator, requires_grad=True)
    h = torch.randn(2, 3, 2, dtype=torch.float64, generator=generator, requires_grad=True)
    w = torch.randn(7, 2, dtype=torch.float64, generator=generator, requires_grad=True)
    b = torch.randn(7, dtype=torch.float64, generator=generator, requires_grad=True)
    labels = torch.randint(0, 7, (2, 3), generator=generator)
    labels[0, 1] = -100
    return z, h, w, b, labels


@pytest.mark.parametrize("options", [{}, {"logit_scale": 0.3, "logit_softcap": 2.0}, {"shift_labels": True}], ids=str)
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_gradcheck_from_logits(double_problem, options, reduction):
    z, _, _, _, labels = double_problem
    for loss in (lk.fused_ihl, lk.fused_cross_entropy):
        torch.autograd.gradcheck(lambda z, f=loss: f(z, labels, reduction=reduction, **options), (z,))


@pytest.mark.parametrize("options", [{}, {"logit_scale": 0.3, "logit_softcap": 2.0}, {"shift_labels": True}], ids=str)
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_gradcheck_from_hidden_states(double_problem, options, reduction):
    _, *inputs, labels = double_problem
    torch.autograd.gradcheck(
        lambda h, w, b: lk.fused_linear_unlearning_loss(
            h, w, labels, 1.0, -0.5, bias=b, reduction=reduction, chunk_bytes=7 * 8 * 2, **options
        ),
        inputs,
    )


def test_gradcheck_of_statistics(double_problem):
    z, *inputs, labels = double_problem
    torch.autograd.gradcheck(lambda z: tuple(lk.target_statistics(z, labels)[i] for i in (0, 1, 3)), (z,))
    torch.autograd.gradcheck(
        lambda h, w, b: tuple(lk.linear_target_statistics(h, w, labels, bias=b)[i] for i in (0, 1, 3)), inputs
    )


def _rows(device):
    """Labels, and weights in tensors, as numbers, and one in each."""
    labels = torch.tensor([4, -100, 0, 16, 3], device=device)
    ihl_weight, ce_weight = torch.ones((), device=device).expand(5), torch.linspace(-1, 1, 5, device=device)
    return labels, ((ihl_weight, 1.0, ce_weight, 1.0), (None, 1.0, None, -0.5), (None, 0.0, ce_weight, 2.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck_from_logits(backend, device, dtype):
    labels, weights = _rows(device)
    z = torch.randn(1, 5, 17, device=device, dtype=dtype, requires_grad=True)
    table = torch.rand(7, 5, device=device)
    index = torch.tensor([3, -1, 4, 5, 6], device=device)
    one = torch.ones(5, device=device)
    for reduction, given in zip(("none", "sum", "mean"), weights, strict=True):
        arguments = (z, labels, *given, -100, 1.0, 0.0, reduction, False)
        torch.library.opcheck(ops.unlearning_loss, arguments)
    torch.library.opcheck(ops.target_statistics, (z, labels, -100, 1.0, 30.0))
    torch.library.opcheck(logits.row_gradient, (z.detach(), labels, index, table[3:], one, -100, 1.0, 0.0))
    torch.library.opcheck(logits.row_gradient_, (z.detach(), labels, index, table[3:], one, -100, 1.0, 0.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("trained", [False, True])
def test_opcheck_from_hidden_states(backend, device, dtype, trained):
    labels, weights = _rows(device)
    h = torch.randn(5, 8, device=device, dtype=dtype, requires_grad=True)
    w = torch.randn(17, 8, device=device, dtype=dtype, requires_grad=trained)
    b = torch.randn(17, device=device, dtype=dtype, requires_grad=trained) if trained else None
    rows = torch.tensor([0, 2, 3, 4], device=device)
    settings = (-100, 1.0, 0.0, 17 * 8)
    needed = (True, trained, trained)
    for reduction, given in zip(("sum", "mean", "mean"), weights, strict=True):
        arguments = (h, w, b, labels, *given, rows, -100, 1.0, 0.0, reduction, 17 * 8, *needed)
        torch.library.opcheck(ops.linear_unlearning_loss, arguments)
    torch.library.opcheck(ops.linear_target_statistics, (h, w, b, labels, rows, *settings))
    frozen = [x if x is None else x.detach() for x in (h, w, b)]
    index = torch.tensor([3, -1, 4, 5, 6], device=device)
    table, one = torch.rand(7, 5, device=device), torch.ones(5, device=device)
    torch.library.opcheck(linear.linear_gradients, (*frozen, labels, index, table[3:], one, rows, *settings, *needed))


FUNCTIONS = {
    "logits": lambda z, h, w, labels: lk.fused_ihl(z, labels),
    "inplace": lambda z, h, w, labels: lk.fused_ihl(z * 2, labels, inplace=True),
    "rows": lambda z, h, w, labels: lk.fused_cross_entropy(z, labels, reduction="none").square().sum(),
    "shifted": lambda z, h, w, labels: lk.fused_ihl(z, labels, shift_labels=True, logit_softcap=10.0),
    "hidden": lambda z, h, w, labels: lk.fused_linear_ihl(h, w, labels),
    "hidden rows": lambda z, h, w, labels: lk.fused_linear_ihl(h, w, labels, reduction="none").square().sum(),
    "statistics": lambda z, h, w, labels: lk.target_statistics(z, labels).rest.sum(),
    "log probability": lambda z, h, w, labels: lk.target_statistics(z, labels).log_probability.sum(),
    "hidden statistics": lambda z, h, w, labels: lk.linear_target_statistics(h, w, labels).rest.sum(),
    "metrics": lambda z, h, w, labels: (
        lambda loss, statistics: loss * statistics.correct.sum() + statistics.target_probability.sum()
    )(*lk.fused_ihl(z, labels, return_statistics=True)),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_compiles_without_a_graph_break(device, name):
    """With ignored rows, whose number the compiler cannot know, and again for another batch size."""
    if name == "log probability" and torch.__version__ < (2, 11):
        pytest.skip("torch 2.10 does not compile properties of named tuples")
    compiled = torch.compile(FUNCTIONS[name], fullgraph=True)
    for batch in (2, 3):
        generator = torch.Generator().manual_seed(batch)
        labels = torch.randint(0, 40, (batch, 6), generator=generator).to(device)
        labels[0, :4] = -100
        shapes = (batch, 6, 40), (batch, 6, 8), (40, 8)
        values = [torch.randn(shape, generator=generator).to(device) for shape in shapes]
        results = []
        for function in (FUNCTIONS[name], compiled):
            inputs = [value.clone().requires_grad_() for value in values]
            loss = function(*inputs, labels)
            results.append((loss, torch.autograd.grad(loss, inputs, allow_unused=True)))
        torch.testing.assert_close(results[1], results[0])


def test_compiled_weights_that_are_numbers(device):
    """That change from call to call, more often than the compiler is willing to compile again."""
    z, h, w = (torch.randn(shape, device=device, requires_grad=True) for shape in ((4, 40), (4, 8), (40, 8)))
    labels = torch.tensor([3, -100, 7, 39], device=device)

    def loss(weight, items):
        return lk.fused_unlearning_loss(z, labels, weight, -0.5) + lk.fused_linear_unlearning_loss(
            h, w, labels, 2, len(items)
        )

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for number in range(12):
        results = []
        for function in (loss, compiled):
            value = function(number, torch.ones(number + 2))
            results.append((value, torch.autograd.grad(value, (z, h, w))))
        torch.testing.assert_close(results[1], results[0])


def test_compiled_inplace_spares_what_others_have_saved(device):
    """tanh keeps its result for the backward pass, so it must not be written over; eager torch would raise."""
    values, labels = torch.randn(3, 40, device=device), torch.tensor([1, 2, 3], device=device)
    gradients = []
    for inplace in (False, True):
        x = values.clone().requires_grad_()
        torch.compile(lambda x, i=inplace: lk.fused_ihl(x.tanh(), labels, inplace=i), fullgraph=True)(x).backward()
        gradients.append(x.grad)
    torch.testing.assert_close(gradients[1], gradients[0])


@pytest.mark.parametrize("view", [False, True])
def test_inplace_spares_what_a_compiled_model_has_saved(device, view):
    """Its saved tensors are not checked for changes, so the logits that it gives must not be written over."""

    def model(x):
        logits = x @ weight.t()
        return logits, logits.square().sum()

    values, weight = torch.randn(2, 3, 8, device=device), torch.randn(40, 8, device=device)
    labels, gradients = torch.tensor([[1, 2, 3], [4, 5, 6]], device=device), []
    for function, inplace in ((model, False), (torch.compile(model, backend="aot_eager"), True)):
        x = values.clone().requires_grad_()
        logits, other = function(x)
        logits, scored = (logits[:, 1:], labels[:, 1:]) if view else (logits, labels)
        (lk.fused_ihl(logits, scored, inplace=inplace) + other).backward()
        gradients.append(x.grad)
    torch.testing.assert_close(gradients[1], gradients[0])


TWICE = {
    "logits": lambda x, w, labels: lk.fused_ihl(x @ w.t(), labels),
    "inplace": lambda x, w, labels: lk.fused_ihl(x @ w.t(), labels, inplace=True),
    "hidden": lambda x, w, labels: lk.fused_linear_ihl(x, w, labels),
    "hidden rows": lambda x, w, labels: lk.fused_linear_ihl(x, w, labels, reduction="none").sum(),
    "statistics": lambda x, w, labels: lk.linear_target_statistics(x, w, labels).rest.sum(),
}


@pytest.mark.parametrize("name", TWICE)
def test_no_double_backward(device, name):
    x, w = torch.randn(3, 8, device=device, requires_grad=True), torch.randn(40, 8, device=device)
    (gradient,) = torch.autograd.grad(TWICE[name](x, w, torch.tensor([1, 2, 3], device=device)), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once"):
        gradient.square().sum().backward()
