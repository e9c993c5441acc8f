"""The losses as the papers write them, in eager torch, and a measure of error that could fail."""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
VOCABULARIES = [2, 3, 31, 1000, 32000, 50257, 51200, 128256, 262144]


def eager_ihl(logits: Tensor, labels: Tensor) -> Tensor:
    """1 + p_t - p_m per row, 0 where the label is negative."""
    probabilities = logits.softmax(dim=-1)
    column = labels.clamp(min=0)[..., None]
    p_target = probabilities.gather(-1, column).squeeze(-1)
    p_runner_up = probabilities.scatter(-1, column, -1.0).max(dim=-1).values
    return torch.where(labels >= 0, 1 + p_target - p_runner_up, 0.0)


def eager_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """-log p_t per row, 0 where the label is negative."""
    log_probabilities = logits.log_softmax(dim=-1)
    return torch.where(labels >= 0, -log_probabilities.gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1), 0.0)


def eager_loss(logits: Tensor, labels: Tensor, ihl_weight: Tensor, ce_weight: Tensor) -> Tensor:
    return ihl_weight * eager_ihl(logits, labels) + ce_weight * eager_cross_entropy(logits, labels)


def loss_and_gradient(loss, logits: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor]:
    """The per-row loss, and the gradient of sum(upstream * loss), in float64."""
    logits = logits.detach().clone().requires_grad_()
    rows = loss(logits)
    (gradient,) = torch.autograd.grad(rows, logits, upstream.to(rows.dtype))
    return rows.detach().double(), gradient.double()


def assert_no_worse(
    ours: Tensor, eager: Tensor, truth: Tensor, dtype: torch.dtype, what: str, slack: float = 1.0
) -> None:
    """Our largest error is at most eager's in the same dtype, or two roundings of the largest true value.

    ``slack`` above 1 is for results that pass through matrix products, whose order of summation is each library's own.
    """
    error, eager_error = ((x.double() - truth).abs().max().item() if truth.numel() else 0.0 for x in (ours, eager))
    floor = 2 * torch.finfo(dtype).eps * (truth.abs().max().item() if truth.numel() else 0.0)
    assert error <= slack * max(eager_error, floor), (
        f"{what}: error {error:.3g}, eager's {eager_error:.3g}, floor {floor:.3g}"
    )


def random_problem(
    rows: int, vocabulary: int, dtype: torch.dtype, device: torch.device, seed: int = 0, spread: float = 3.0
) -> tuple[Tensor, Tensor]:
    """Logits and labels; row 1 is ignored and in row 2 the label is the likeliest token."""
    generator = torch.Generator().manual_seed(seed)
    logits = (spread * torch.randn(rows, vocabulary, generator=generator)).to(dtype)
    labels = torch.randint(0, vocabulary, (rows,), generator=generator)
    labels[1:2] = -100
    labels[2:3] = logits[2:3].argmax(dim=-1)
    return logits.to(device), labels.to(device)
