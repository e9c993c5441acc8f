"""Gradients beside those of other implementations, where they are installed and can run."""

from __future__ import annotations

import pytest
import torch
from oracle import random_problem

import loku_kernels as lk
from loku.formulations import authors_ihl


@pytest.mark.parametrize("vocabulary", [31, 32000])
def test_liger_cross_entropy_and_the_authors_ihl(backend, device, vocabulary):
    """Forget rows with the hinge, retain rows with the cross-entropy, as one sum."""
    liger = pytest.importorskip("liger_kernel.ops.cross_entropy", reason="liger-kernel is not installed")
    logits, labels = random_problem(6, vocabulary, torch.float32, device)
    labels = labels.clamp(min=0)
    forget = torch.tensor([1, 1, 0, 0, 1, 0], device=device).bool()

    ours = logits.clone().requires_grad_()
    lk.fused_unlearning_loss(ours, labels, forget.float(), (~forget).float(), reduction="sum").backward()

    peers = logits.clone().requires_grad_()
    (authors_ihl(peers[forget], labels[forget]) * forget.sum()).backward()
    # Liger's forward pass leaves the gradient of its loss in its last result.
    *_, liger_gradient = liger.cross_entropy_forward(
        logits[~forget].clone().requires_grad_(), labels[~forget], None, -100, 0.0, 0.0, "sum", None, False
    )
    peers.grad[~forget] += liger_gradient.detach()
    torch.testing.assert_close(ours.grad, peers.grad, rtol=2e-5, atol=1e-8)
