"""The inverted hinge loss as it is otherwise written: what the kernels are compared with."""

from __future__ import annotations

import torch
from torch import Tensor


def eager_ihl(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over the rows of 1 + p_t - p_m, in plain torch: softmax, gather, scatter, max."""
    probabilities = logits.softmax(dim=-1)
    column = labels[:, None]
    target = probabilities.gather(1, column).squeeze(1)
    runner_up = probabilities.scatter(1, column, -1.0).max(dim=1).values
    return (1 + target - runner_up).mean()


def authors_ihl(logits: Tensor, labels: Tensor) -> Tensor:
    """The same in the manner of the paper's public program, a multi-class hinge with its sign turned.

    It looks whether the logits might be probabilities already, and takes the runner-up from a copy of the probabilities
    without the target's, made with a boolean one-hot mask.
    """
    rows, vocabulary = logits.shape
    if not torch.all((logits >= 0) & (logits <= 1)):
        logits = logits.softmax(dim=1)
    is_target = torch.nn.functional.one_hot(labels, vocabulary).bool()
    target = logits[is_target]
    runner_up = logits[~is_target].view(rows, vocabulary - 1).max(dim=1).values
    return torch.clamp(1 + target - runner_up, min=0).mean()
