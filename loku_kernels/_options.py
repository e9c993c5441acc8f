"""Keyword options of the losses, for type checkers: an overload names them all at once.

The functions list them once more, with their defaults; tests/test_typing.py tells where the two differ.
"""

from __future__ import annotations

from typing import TypedDict

from torch import Tensor


class LossOptions(TypedDict, total=False):
    ignore_index: int
    reduction: str
    num_items_in_batch: float | Tensor | None
    shift_labels: bool
    logit_scale: float
    logit_softcap: float | None


class LogitOptions(LossOptions, total=False):
    inplace: bool


class HeadOptions(LossOptions, total=False):
    bias: Tensor | None
    rows: Tensor | None
    chunk_bytes: int | None
