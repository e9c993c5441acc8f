"""Other implementations, where they are installed and run on the device at hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.harness import Candidate, forward_backward


def compiled(function: Callable) -> Callable:
    """``torch.compile`` of a formulation, for the very shapes that it meets, whatever it met before."""
    torch.compiler.reset()  # or after eight shapes it would go on as eager
    return torch.compile(function, dynamic=False)


def liger_cross_entropy(bench: Any, logits: Tensor, labels: Tensor) -> list[Candidate]:
    """Liger's cross-entropy from logits, which writes the gradient over a copy of them."""
    if not _runs(bench, "liger-kernel", "liger_kernel.transformers"):
        return []
    from liger_kernel.transformers import LigerCrossEntropyLoss

    loss = LigerCrossEntropyLoss()
    return [Candidate("Liger (CE)", "peer", forward_backward(lambda: loss(logits.clone(), labels), logits))]


def linear_cross_entropies(
    bench: Any, hidden: Tensor, weight: Tensor, labels: Tensor, check: Callable[[Any], None]
) -> list[Candidate]:
    """Cross-entropy from hidden states: torch's own in chunks, Liger's and Apple's."""
    losses: dict[str, Callable[[], Tensor]] = {}
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        options = torch.nn.LinearCrossEntropyOptions()
        losses["F.linear_cross_entropy (CE)"] = lambda: torch.nn.functional.linear_cross_entropy(
            hidden, weight, labels, options=options
        )
    else:
        bench.skip_peer("F.linear_cross_entropy", f"torch {torch.__version__} does not have it")
    if _runs(bench, "liger-kernel", "liger_kernel.transformers"):
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        liger = LigerFusedLinearCrossEntropyLoss()
        losses["Liger (CE)"] = lambda: liger(weight, hidden, labels)
    if hidden.dtype == torch.float32:
        bench.skip_peer("cut-cross-entropy in float32", "its backward pass takes 16-bit hidden states only")
    elif _runs(bench, "cut-cross-entropy", "cut_cross_entropy"):
        from cut_cross_entropy import linear_cross_entropy

        losses["cut-cross-entropy (CE)"] = lambda: linear_cross_entropy(hidden, weight, labels)
    return [Candidate(name, "peer", forward_backward(loss, hidden), 3, check) for name, loss in losses.items()]


def _runs(bench: Any, package: str, module: str) -> bool:
    """Whether a package of Triton kernels can run here; if not, say why in the summary."""
    if bench.device.type != "cuda":
        bench.skip_peer(package, "its kernels need a GPU")
        return False
    try:
        __import__(module)
    except ImportError as error:
        bench.skip_peer(package, f"not installed ({error})")
        return False
    return True
