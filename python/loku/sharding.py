"""Weights that no process holds whole."""

from __future__ import annotations

from torch import Tensor
from torch.distributed.tensor import DTensor


def is_sharded(weight: Tensor) -> bool:
    """Whether a parameter is in the hands of FSDP 2 or of DeepSpeed's ZeRO-3, which hold it in parts between uses."""
    return isinstance(weight, DTensor) or hasattr(weight, "ds_id")
