"""Losses from hidden states with a frozen head: time and memory beside the bare GEMMs, torch and other libraries."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear, pad

from bench.harness import MIB, Candidate, forward_backward, leaf
from bench.peers import compiled, linear_cross_entropies
from loku.formulations import eager_ihl
from loku_kernels import fused_linear_cross_entropy, fused_linear_ihl, gemm, launch, processor

SHAPES = [(2048, 768, 50257), (1024, 2048, 51200), (512, 4096, 32000)]
if torch.cuda.is_available():
    SHAPES = [(8192, d, v) for _, d, v in SHAPES]
QUICK_SHAPES = [(64, 64, 5003)]
DTYPES = [torch.float32, torch.bfloat16]


def problem(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    n, d, v = shape
    generator = torch.Generator(device).manual_seed(0)
    hidden = torch.randn(n, d, generator=generator, device=device).to(dtype)
    weight = (torch.randn(v, d, generator=generator, device=device) * 2 / d**0.5).to(dtype)
    return leaf(hidden), weight, torch.randint(0, v, (n,), generator=generator, device=device)


def eager_linear_ihl(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return eager_ihl(linear(hidden, weight), labels)


def agrees_with(
    loss: Callable[[Tensor, Tensor], Tensor], hidden: Tensor, weight: Tensor, labels: Tensor, rows: int = 16
) -> Callable[[Any], None]:
    """A check against float64 of the first rows' gradients of the mean over all labels that count.

    Of those in which rounding the logits to the dtype of ``hidden`` does not decide which is the runner-up.
    """
    exact = leaf(hidden[:rows].double())
    counted = labels[:rows] != -100
    logits = linear(exact[counted], weight.double())
    loss(logits, labels[:rows][counted]).backward()
    others = logits.detach().scatter(1, labels[:rows][counted, None], -torch.inf)
    first, second = others.topk(2).values.unbind(1)
    decided = first - second > 2 * torch.finfo(hidden.dtype).eps * first.abs()
    assert decided.any()
    truth = exact.grad * (counted.sum() / (labels != -100).sum())
    bound = 2e-5 if hidden.dtype == torch.float32 else 3e-2

    def check(result: tuple[Tensor, tuple[Tensor]]) -> None:
        _, (gradient,) = result
        found, expected = (x[:rows][counted][decided] for x in (gradient.double(), truth))
        assert (found - expected).norm() < bound * expected.norm()

    return check


def lacks_products(hidden: Tensor) -> bool:
    """Whether torch would take minutes: this processor has no products of the dtype."""
    return hidden.device.type == "cpu" and hidden.dtype == torch.bfloat16 and not processor.multiplies(hidden.dtype)


def bare_gemms(hidden: Tensor, weight: Tensor, grad_logits: Tensor) -> list[Candidate]:
    """logits = hidden W^T and grad_hidden = grad_logits W, by each route that torch has; into memory that is there
    already, where the route can."""
    onednn = torch.ops.mkldnn._linear_pointwise

    def by_onednn() -> None:
        onednn(hidden, weight, None, "none", [], "")
        onednn(grad_logits, weight.t(), None, "none", [], "")

    def by_both() -> None:
        onednn(hidden, weight, None, "none", [], "")
        torch.mm(weight.t(), grad_logits.t())

    def in_float32() -> None:
        wide = weight.float()
        onednn(hidden.float(), wide, None, "none", [], "").to(hidden.dtype)
        torch.mm(wide.t(), grad_logits.float().t()).to(hidden.dtype)

    routes = [] if lacks_products(hidden) else [by_mm("two bare GEMMs, torch.mm", hidden, weight, grad_logits)]
    if missing := gemm.missing_rows(
        weight
    ):  # of a vocabulary that cuBLAS likes, which users of the odd one do not know
        aligned = pad(weight, (0, 0, 0, missing)), pad(grad_logits, (0, missing))
        routes.append(by_mm(f"two bare GEMMs, {len(aligned[0])} columns", hidden, *aligned))
    if gemm.is_widened(hidden):
        routes.append(Candidate("two GEMMs, cast to float32", "limit", in_float32))
    if hidden.device.type == "cpu" and hidden.dtype == torch.float32:
        routes.append(Candidate("two bare GEMMs, oneDNN", "limit", by_onednn))
        routes.append(Candidate("two bare GEMMs, oneDNN and torch.mm of the transpose", "limit", by_both))
    return routes


def by_mm(name: str, hidden: Tensor, weight: Tensor, grad_logits: Tensor) -> Candidate:
    logits, grad_hidden = torch.zeros_like(grad_logits), torch.zeros_like(hidden)

    def run() -> None:
        torch.mm(hidden, weight.t(), out=logits)
        torch.mm(grad_logits, weight, out=grad_hidden)

    return Candidate(name, "limit", run)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_frozen_head(bench, shape, dtype):
    hidden, weight, labels = problem(shape, dtype, bench.device)
    n, d, v = shape
    check_ihl, check_ce = (agrees_with(loss, hidden, weight, labels) for loss in (eager_ihl, cross_entropy))

    def candidate(name: str, role: str, loss: Callable[..., Tensor], check: Callable, every: int = 1) -> Candidate:
        return Candidate(name, role, forward_backward(lambda: loss(hidden, weight, labels), hidden), every, check)

    candidates = [
        candidate("fused_linear_ihl", "ours", fused_linear_ihl, check_ihl),
        candidate("fused_linear_cross_entropy", "ours", fused_linear_cross_entropy, check_ce),
        *bare_gemms(hidden.detach(), weight, torch.rand(n, v, device=bench.device).to(dtype)),
    ]
    if lacks_products(hidden) and not bench.quick:
        bench.skip_peer(f"torch in {dtype}", "would take minutes a call: this processor has no products of that type")
    else:
        candidates += [
            candidate("torch eager", "peer", eager_linear_ihl, check_ihl, 3),
            candidate("torch.compile", "peer", compiled(eager_linear_ihl), check_ihl, 3),
            *linear_cross_entropies(bench, hidden, weight, labels, check_ce),
        ]
    workload = f"hidden states, {n} x {d} x {v} {str(dtype)[6:]}"
    found = bench.measure(workload, candidates, work=4 * n * d * v, unit="GFLOP/s")
    ours = found["fused_linear_ihl"]
    bound = 1.05 if bench.device.type == "cpu" else 1.15
    bench.target(workload, "ours / fastest bare GEMMs", 1 / ours.share_of_limit, bound)
    for name in ("Liger (CE)", "cut-cross-entropy (CE)"):
        if name in found:
            bench.target(workload, f"{name} / ours", found[name].median_ms / ours.median_ms, 1.0, at_least=True)
    if dtype == torch.float32 and bench.device.type == "cpu":
        bench.target(workload, "eager / ours", found["torch eager"].median_ms / ours.median_ms, 2.4, at_least=True)
    bench.target(
        workload,
        "peak memory beside the gradients, in chunks of logits",
        (ours.peak_mib - 2 * hidden.nbytes / MIB) / chunk_mib(shape, dtype, bench.device),
        2.0,
    )


def chunk_mib(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> float:
    n, _, v = shape
    budget = launch.default_chunk_bytes(device.type)
    return launch.chunk_rows(n, v, dtype.itemsize, budget) * v * dtype.itemsize / MIB


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ignored_rows(bench, shape, dtype):
    """60% of the labels ignored, as prompts are: the time should follow the rows that count."""
    hidden, weight, labels = problem(shape, dtype, bench.device)
    ignored = labels.masked_fill(torch.arange(len(labels), device=labels.device) % 5 < 3, -100)
    rows = (ignored >= 0).nonzero().squeeze(1)

    workload = f"hidden states, 60% ignored, {' x '.join(map(str, shape))} {str(dtype)[6:]}"
    candidates = [
        Candidate(
            "40% of the rows count",
            "ours",
            forward_backward(lambda: fused_linear_ihl(hidden, weight, ignored, rows=rows), hidden),
            check=agrees_with(eager_ihl, hidden, weight, ignored),
        ),
        Candidate("all rows count", "ours", forward_backward(lambda: fused_linear_ihl(hidden, weight, labels), hidden)),
    ]
    found = bench.measure(workload, candidates, work=4 * len(rows) * shape[1] * shape[2], unit="GFLOP/s")
    share = found["40% of the rows count"].median_ms / found["all rows count"].median_ms
    bench.target(workload, "time, share of that for all rows", share, 0.45)
