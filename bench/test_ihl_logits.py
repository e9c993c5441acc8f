"""Losses from logits: time and memory beside the limits, torch, and the authors' formulation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.harness import Candidate, forward_backward, leaf
from bench.peers import compiled, liger_cross_entropy
from loku.formulations import authors_ihl, eager_ihl
from loku_kernels import fused_ihl
from loku_kernels.backends import cpp, select
from loku_kernels.backends.weights import RowWeights

SHAPES = [(1024, 50257), (2048, 32000), (512, 128256)]
if torch.cuda.is_available():
    SHAPES = [(8192, 32000), (8192, 50257), (4096, 128256)]
QUICK_SHAPES = [(64, 5003)]
DTYPES = [torch.float32, torch.bfloat16]
SLOW, SLOWEST = 3, 5


def problem(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    logits = torch.randn(shape, generator=generator, device=device).to(dtype)
    labels = torch.randint(0, shape[1], shape[:1], generator=generator, device=device)
    return logits, labels


class Truth:
    """The mean loss, and its gradient in a few rows, in float64."""

    def __init__(self, logits: Tensor, labels: Tensor, rows: int = 8) -> None:
        pieces = zip(logits.split(64), labels.split(64), strict=True)
        self.loss = sum(eager_ihl(z.double(), t) * len(t) for z, t in pieces) / len(labels)
        # The runner-up is the lowest of equal logits, which 16-bit logits often are; eager torch may take any.
        order = torch.arange(logits.shape[1], device=logits.device) * 1e-12
        exact = leaf(logits[:rows].double() - order)
        eager_ihl(exact, labels[:rows]).backward()
        self.gradient = exact.grad * (rows / len(labels))

    def check_loss(self, loss: Tensor) -> None:
        torch.testing.assert_close(loss.double(), self.loss, rtol=1e-5, atol=0)

    def check(self, result: tuple[Tensor, tuple[Tensor]]) -> None:
        loss, (gradient,) = result
        self.check_loss(loss)
        rtol = torch.finfo(gradient.dtype).eps + 1e-5
        torch.testing.assert_close(gradient[: len(self.gradient)].double(), self.gradient, rtol=rtol, atol=1e-12)

    def check_roughly(self, result: tuple[Tensor, tuple[Tensor]]) -> None:
        """Peers round probabilities to the logits' dtype, and may spread the gradient over equal logits."""
        loss, (gradient,) = result
        torch.testing.assert_close(loss.double(), self.loss, rtol=2e-2, atol=0)
        error = (gradient[: len(self.gradient)].double() - self.gradient).norm() / self.gradient.norm()
        assert error < (1e-3 if gradient.dtype == torch.float32 else 1.0)


def kernel_call(name: str, logits: Tensor, labels: Tensor) -> Callable[[], Any]:
    """A call of the backend's kernel for IHL, without the operator around it."""
    kernel, weights = getattr(select(logits), name), RowWeights(None, 1.0, None, 0.0)
    return lambda: kernel(logits[None], labels, weights, ignore_index=-100, scale=1.0, softcap=0.0)


def probes(logits: Tensor) -> list[Candidate]:
    """The limits of the machine: reading the logits once, and forming as many exponentials from cache."""
    if logits.device.type == "cpu" and (instruction_sets := cpp.instruction_sets()):
        best, kernels = len(instruction_sets) - 1, torch.ops.loku_kernels_cpp
        return [
            Candidate("read the logits once", "limit", lambda: kernels.read_probe(logits, best)),
            Candidate(
                "as many exponentials, from cache", "limit", lambda: kernels.exponential_probe(logits.numel(), best)
            ),
        ]
    copy = torch.empty_like(logits)
    return [Candidate("copy of the logits", "limit", lambda: copy.copy_(logits))]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_loss(bench, shape, dtype):
    logits, labels = problem(shape, dtype, bench.device)
    truth = Truth(logits, labels)
    workload = f"loss, {shape[0]} x {shape[1]} {str(dtype)[6:]}"

    def peer(name: str, loss: Callable[[Tensor, Tensor], Tensor], every: int) -> Candidate:
        return Candidate(name, "peer", lambda: loss(logits, labels), every)

    candidates = [
        Candidate("fused_ihl", "ours", lambda: fused_ihl(logits, labels), check=truth.check_loss),
        Candidate("its kernel", "ours", kernel_call("row_losses", logits, labels)),
        *probes(logits),
        peer("torch eager", eager_ihl, SLOW),
        peer("torch.compile", compiled(eager_ihl), SLOW),
        peer("authors", authors_ihl, SLOWEST),
    ]
    with torch.no_grad():
        found = bench.measure(workload, candidates, work=logits.nbytes, unit="GB/s", limit=max)
    ours = found["fused_ihl"]
    bound = 1.3 if bench.device.type == "cpu" else 0.55
    bench.target(workload, "loss / slower of the limits", 1 / ours.share_of_limit, bound)
    bench.target(workload, "its kernel / slower of the limits", 1 / found["its kernel"].share_of_limit, bound)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_loss_and_gradient(bench, shape, dtype):
    """With the gradient in memory of its own, over the logits, and as the one kernel that a chunk goes through."""
    logits, labels = problem(shape, dtype, bench.device)
    truth = Truth(logits, labels)
    z, spare, scaled = leaf(logits), logits.clone(), logits.clone()
    overwritten = leaf(spare)

    def restore() -> None:
        spare.copy_(logits)

    def peer(name: str, loss: Callable[[Tensor, Tensor], Tensor], every: int) -> Candidate:
        return Candidate(name, "peer", forward_backward(lambda: loss(z, labels), z), every, truth.check_roughly)

    workload = f"loss and gradient, {shape[0]} x {shape[1]} {str(dtype)[6:]}"
    candidates = [
        Candidate("fused_ihl", "ours", forward_backward(lambda: fused_ihl(z, labels), z), check=truth.check),
        Candidate(
            "fused_ihl(inplace=True)",
            "ours",
            forward_backward(lambda: fused_ihl(overwritten, labels, inplace=True), overwritten),
            check=truth.check,
            prepare=restore,
        ),
        Candidate(
            "the chunk kernel, in place",
            "ours",
            kernel_call("row_losses_and_gradient_", spare, labels),
            prepare=restore,
        ),
        Candidate("scaling the logits in place", "limit", lambda: scaled.mul_(1.0)),
        *probes(logits),
        peer("torch eager", eager_ihl, SLOW),
        peer("torch.compile", compiled(eager_ihl), SLOW),
        peer("authors", authors_ihl, SLOWEST),
        *liger_cross_entropy(bench, z, labels),
    ]
    found = bench.measure(workload, candidates, work=2 * logits.nbytes, unit="GB/s", limit=max)
    times = {name: m.median_ms for name, m in found.items()}
    for name in ("fused_ihl(inplace=True)", "the chunk kernel, in place"):
        share = found[name].peak_mib * 2**20 / logits.nbytes
        bench.target(workload, f"extra memory of {name}, share of the logits", share, 0.05)
    if bench.device.type == "cuda":
        copy = times["copy of the logits"]
        bench.target(workload, "loss and backward / copy", times["fused_ihl"] / copy, 1.6)
        bench.target(workload, "the chunk kernel / copy", times["the chunk kernel, in place"] / copy, 1.1)
    if dtype == torch.float32 and bench.allocator == "warm":
        bench.target(workload, "eager / ours", times["torch eager"] / times["fused_ihl"], 5.0, at_least=True)
        bench.target(workload, "authors / ours", times["authors"] / times["fused_ihl"], 30.0, at_least=True)


def test_with_a_warm_allocator(bench):
    """The same without page faults for fresh gradients: what the kernels take."""
    bench.run_with_a_warm_allocator(Path(__file__))
