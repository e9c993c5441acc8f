"""What only a GPU can show: no synchronisation, CUDA graphs, races that would change bits, tensors of real size."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from oracle import DTYPES, eager_ihl, loss_and_gradient
from torch import Tensor

import loku_kernels as lk
from loku_kernels.backends import select
from loku_kernels.backends.weights import RowWeights

pytestmark = pytest.mark.gpu
ROWS, HIDDEN, VOCABULARY = 96, 64, 3001


class Inputs:
    """Tensors on the GPU, the same for the same seed; two in five labels are ignored."""

    def __init__(self, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> None:
        generator = torch.Generator("cuda").manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device="cuda").to(dtype)

        self.logits, self.hidden, self.weight = (
            normal(ROWS, VOCABULARY),
            normal(ROWS, HIDDEN),
            normal(VOCABULARY, HIDDEN),
        )
        self.bias, self.grad_outputs = normal(VOCABULARY), normal(ROWS, VOCABULARY)
        self.labels = torch.randint(0, VOCABULARY, (ROWS,), generator=generator, device="cuda")
        self.labels[torch.arange(ROWS, device="cuda") % 5 < 2] = -100
        self.rows = torch.arange(ROWS, device="cuda")[torch.arange(ROWS) % 5 >= 2]
        self.offsets = torch.tensor([0, 7, 40, 40, ROWS], device="cuda")
        self.weights = torch.rand(4, generator=generator, device="cuda")
        self.row_weights = torch.rand(ROWS, generator=generator, device="cuda")

    def tensors(self) -> list[Tensor]:
        return list(vars(self).values())


def with_gradient(loss: Callable[..., Tensor], *leaves: Tensor) -> list[Tensor]:
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    value = loss(*leaves)
    return [value.detach(), *torch.autograd.grad(value.sum(), leaves)]


def accumulated(i: Inputs) -> list[Tensor]:
    fisher = torch.zeros(VOCABULARY, HIDDEN, device="cuda")
    lk.fisher_accumulate(fisher, i.hidden, i.grad_outputs, offsets=i.offsets, weights=i.weights)
    lk.fisher_accumulate_grad(fisher, i.weight, 0.5)
    return [fisher]


WORK: dict[str, Callable[[Inputs], list[Tensor]]] = {
    "logits": lambda i: with_gradient(lambda z: lk.fused_ihl(z, i.labels), i.logits),
    "logits, weights of rows": lambda i: with_gradient(
        lambda z: lk.fused_unlearning_loss(z, i.labels, i.row_weights, -i.row_weights), i.logits
    ),
    "logits, in place": lambda i: with_gradient(lambda z: lk.fused_ihl(z * 2, i.labels, inplace=True), i.logits),
    "logits, shifted and capped": lambda i: with_gradient(
        lambda z: lk.fused_cross_entropy(z, i.labels, shift_labels=True, logit_softcap=20.0), i.logits
    ),
    "hidden states": lambda i: with_gradient(lambda h: lk.fused_linear_ihl(h, i.weight, i.labels), i.hidden),
    "hidden states, rows given": lambda i: with_gradient(
        lambda h: lk.fused_linear_ihl(h, i.weight, i.labels, rows=i.rows, chunk_bytes=16 * VOCABULARY * 2), i.hidden
    ),
    "trained head": lambda i: with_gradient(
        lambda h, w, b: lk.fused_linear_unlearning_loss(h, w, i.labels, 1.0, -0.5, bias=b, reduction="none"),
        *(i.hidden, i.weight, i.bias),
    ),
    "statistics": lambda i: with_gradient(lambda z: lk.target_statistics(z, i.labels).rest, i.logits),
    "fisher": accumulated,
}


@contextmanager
def synchronisation_forbidden() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", WORK)
def test_the_host_never_waits(name):
    inputs = Inputs()
    WORK[name](inputs)  # kernels are compiled and loaded once, which may wait
    with synchronisation_forbidden():
        WORK[name](inputs)


@pytest.mark.parametrize("name", WORK)
def test_a_cuda_graph_replays_it_for_new_inputs(name):
    inputs = Inputs()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        WORK[name](inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = WORK[name](inputs)
    fresh = Inputs(seed=1)
    for old, new in zip(inputs.tensors(), fresh.tensors(), strict=True):
        old.copy_(new)
    graph.replay()
    torch.testing.assert_close(results, WORK[name](fresh), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", WORK)
def test_repeated_runs_agree_to_the_bit(name, dtype):
    inputs = Inputs(dtype=dtype)
    first = WORK[name](inputs)
    for _ in range(20):
        torch.testing.assert_close(WORK[name](inputs), first, rtol=0, atol=0)


@pytest.mark.parametrize("columns", [262144, 262145], ids=["aligned rows", "odd rows"])
def test_more_than_2_to_31_elements(columns):
    """Out of place and as the chunk kernel; rows at both ends and on both sides of element 2^31 against float64."""
    rows = 2**31 // columns + 65
    if torch.cuda.get_device_properties(0).total_memory < 3 * rows * columns * 2:
        pytest.skip("the logits and their gradient take 9 GB of GPU memory")
    logits = torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16)
    labels = torch.randint(0, columns, (rows,), device="cuda")
    probed = torch.tensor([0, 1, 2**31 // columns - 1, 2**31 // columns, 2**31 // columns + 1, rows - 1])
    order = torch.arange(columns, device="cuda") * 1e-12  # the runner-up is the lowest of equal logits
    true_loss, true_gradient = loss_and_gradient(
        lambda z: eager_ihl(z, labels[probed]), logits[probed].double() - order, torch.ones(len(probed), device="cuda")
    )
    expected = true_gradient.to(logits.dtype).double()
    z = logits.requires_grad_()
    loss = lk.fused_ihl(z, labels, reduction="none")
    (gradient,) = torch.autograd.grad(loss.sum(), z)
    torch.testing.assert_close(loss.detach()[probed].double(), true_loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(gradient[probed].double(), expected, rtol=1e-2, atol=1e-12)
    logits = logits.detach()
    settings = {"ignore_index": -100, "scale": 1.0, "softcap": 0.0}
    select(logits).row_losses_and_gradient_(logits[None], labels, RowWeights(None, 1.0, None, 0.0), **settings)
    torch.testing.assert_close(logits[probed].double(), expected, rtol=1e-2, atol=1e-12)
