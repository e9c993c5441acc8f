"""What ``fisher_accumulate`` is told of a batch: the sequences' bounds and weights, on any layer's device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from loku_kernels.ops.fisher import check_offsets


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
        offsets = torch.as_tensor(offsets, dtype=torch.int64)
        counts = torch.as_tensor(label_counts, dtype=torch.float64)
        if offsets.dim() != 1 or len(offsets) == 0 or counts.shape != (len(offsets) - 1,):
            raise ValueError(
                "offsets must have shape (sequences + 1,) and label_counts (sequences,), "
                f"but have {tuple(offsets.shape)} and {tuple(counts.shape)}"
            )
        self.tokens = int(offsets[-1])
        check_offsets(offsets, self.tokens)
        self.label_tokens = counts.sum()
        if granularity == "batch":
            offsets, counts = torch.tensor([0, self.tokens]), self.label_tokens[None]
        elif granularity == "token":
            offsets, counts = torch.arange(self.tokens + 1), counts.new_ones(self.tokens)
        self._offsets = offsets
        self._weights = 1 / (counts.clamp(min=1) * loss_scale**2 * unit)
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
