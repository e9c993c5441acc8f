"""What a sequence is in the batch for."""

from __future__ import annotations

from enum import IntEnum


class Role(IntEnum):
    """FORGET: to be unlearned. RETAIN: to be kept. PREFERRED: to be said in place of the forget sequence."""

    FORGET = 0
    RETAIN = 1
    PREFERRED = 2
