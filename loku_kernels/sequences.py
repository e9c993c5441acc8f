"""Which tokens of a batch form a sequence, and which labels they are scored against."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from loku_kernels.ops.fisher import check_offsets

IGNORE_INDEX = -100  # of tokens that are not scored, by default in torch's losses and in ours


def sequence_offsets(batch: Mapping[str, Tensor]) -> Tensor:
    """Bounds (S + 1,) of the sequences of a batch as data collators make it, int64, counted through all its rows.

    From ``cu_seq_lens_q`` where it is given. Otherwise each row begins a sequence, and so does, in a packed batch, each
    position 0 of ``position_ids`` that ``attention_mask`` (batch, tokens), if given, does not mask out. Padding belongs
    to some sequence, to which it adds nothing. With position_ids on a GPU this waits for the device.
    """
    if batch.get("cu_seq_lens_q") is not None:
        return batch["cu_seq_lens_q"].reshape(-1).to(torch.int64)
    rows, length = batch["labels"].shape
    positions = batch.get("position_ids")
    if positions is None:
        return torch.arange(rows + 1, device="cpu") * length
    starts = (positions == 0).expand(rows, length).clone()
    mask = batch.get("attention_mask")
    if mask is not None and mask.dim() == 2:
        starts &= mask != 0
    starts[:, 0] = True
    return torch.nn.functional.pad(starts.flatten().nonzero().squeeze(1), (0, 1), value=rows * length)


def checked_offsets(offsets: Tensor | Sequence[int], tokens: int | None = None) -> Tensor:
    """Bounds (S + 1,), int64 on the CPU. ValueError unless they start at 0, never decrease, and end at ``tokens``."""
    offsets = torch.as_tensor(offsets, dtype=torch.int64).cpu()
    if offsets.dim() != 1 or len(offsets) == 0:
        raise ValueError(f"offsets must have shape (sequences + 1,), but have {tuple(offsets.shape)}")
    check_offsets(offsets, int(offsets[-1]) if tokens is None else tokens)
    return offsets


def next_token_labels(labels: Tensor, offsets: Tensor, ignore_index: int) -> Tensor:
    """``labels`` (batch, tokens) moved one position ahead; the last token of a sequence is scored against nothing."""
    shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=ignore_index).flatten()
    shifted[offsets[1:-1].to(labels.device) - 1] = ignore_index
    return shifted.view(labels.shape)


def label_counts(targets: Tensor, offsets: Tensor, ignore_index: int) -> Tensor:
    """Labels that count in each sequence, (S,) int64, from labels that were moved already."""
    counted = torch.nn.functional.pad((targets.flatten() != ignore_index).cumsum(0), (1, 0))
    return counted[offsets.to(targets.device)].diff()
