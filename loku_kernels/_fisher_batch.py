"""What is in a batch, and what ``fisher_accumulate`` is told of it: sequences' bounds and weights, on any device."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from loku_kernels.sequences import (
    IGNORE_INDEX,
    checked_offsets,
    label_counts,
    next_token_labels,
    sequence_offsets,
)


def read_batch(
    batch: Mapping[str, Any], offsets: Tensor | Sequence[int] | None, ignore_index: int
) -> tuple[dict[str, Any], Tensor, Tensor, Tensor]:
    """What the model is called with, the labels moved to the positions that predict them (-100 where there is none),
    bounds and label counts of the sequences."""
    inputs = dict(batch)
    labels = inputs.pop("labels", None)
    if labels is None or labels.dim() != 2:
        found = "none" if labels is None else f"those of shape {tuple(labels.shape)}"
        raise ValueError(f"batch must have labels of shape (batch, tokens), but has {found} beside {list(inputs)}")
    offsets = checked_offsets(sequence_offsets(batch) if offsets is None else offsets, labels.numel())
    targets = next_token_labels(labels, offsets, ignore_index)
    nothing = targets == ignore_index
    mask = batch.get("attention_mask")
    if mask is not None and mask.dim() == 2:  # padding on the left would predict a sequence's first token
        nothing |= mask == 0
    targets = targets.masked_fill(nothing, IGNORE_INDEX)
    return inputs, targets, offsets, label_counts(targets, offsets, IGNORE_INDEX)


class Batch:
    """Bounds and weights such that squares of the loss's gradients add up to n_s g_s^2 / unit.

    g_s is the gradient of a mean over n_s labels; what arrives is the gradient of ``loss_scale`` times their sum.
    """

    def __init__(
        self,
        offsets: Tensor | Sequence[int],
        label_counts: Tensor | Sequence[int],
        loss_scale: float | Tensor,
        unit: float,
        granularity: str,
    ) -> None:
        offsets = checked_offsets(offsets)
        counts = torch.as_tensor(label_counts, dtype=torch.float64).cpu()
        if counts.shape != (len(offsets) - 1,):
            raise ValueError(
                f"label_counts must have one entry per sequence, ({len(offsets) - 1},), but has {tuple(counts.shape)}"
            )
        scale = float(loss_scale)
        if scale == 0 or not math.isfinite(scale):
            raise ValueError(f"loss_scale must be a finite number other than 0, but is {scale}")
        self.tokens = int(offsets[-1])
        self.label_tokens = counts.sum()
        if granularity == "batch":
            offsets, counts = torch.tensor([0, self.tokens], device="cpu"), self.label_tokens[None]
        elif granularity == "token":
            offsets, counts = torch.arange(self.tokens + 1, device="cpu"), counts.new_ones(self.tokens)
        self._offsets = offsets
        self._weights = 1 / (counts.clamp(min=1) * scale**2 * unit)
        self._copies: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}

    def on(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Offsets (S + 1,) and weights (S,)."""
        if (device, dtype) not in self._copies:
            self._copies[device, dtype] = self._offsets.to(device), self._weights.to(device, dtype)
        return self._copies[device, dtype]


def joined(uses: list[tuple[Tensor, Tensor]], offsets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, gradients and offsets in which the tokens of a sequence stand together, whatever use they are from."""
    if len(uses) == 1:
        return *uses[0], offsets
    sequence = torch.bucketize(torch.arange(len(uses[0][0]), device=offsets.device), offsets[1:], right=True)
    order = torch.argsort(sequence.repeat(len(uses)), stable=True)
    inputs, grads = (torch.cat(tensors)[order] for tensors in zip(*uses, strict=True))
    return inputs, grads, offsets * len(uses)
