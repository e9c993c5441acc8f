"""A short name for the contents of a weight, to tell base models apart."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

_SAMPLES = 1024


def fingerprint(weight: Tensor) -> str:
    """16 hexadecimal digits from the shape and 1,024 entries rounded to bfloat16, so that a float32 copy of a 16-bit
    model (and its 16-bit rounding) has the same name, while a fine-tuned one has another."""
    flat = weight.detach().reshape(-1)
    count = min(_SAMPLES, flat.numel())
    stride = (flat.numel() // count) | 1  # odd: an even one would visit few columns
    index = (torch.arange(count, device=flat.device) * stride) % flat.numel()
    sample = flat[index].to("cpu", torch.bfloat16).view(torch.int16)
    return hashlib.sha256(repr((tuple(weight.shape), sample.tolist())).encode()).hexdigest()[:16]


def check_fingerprints(expected: dict[str, str], weights: dict[str, Tensor], what: str) -> None:
    """Raises ValueError if a weight is not the one whose fingerprint was taken."""
    differing = [name for name, weight in weights.items() if name in expected and fingerprint(weight) != expected[name]]
    if differing:
        raise ValueError(
            f"{what} belongs to another base model: the weights of {', '.join(differing[:3])} "
            f"({len(differing)} of {len(weights)} modules) differ from those it was made with. Load the original, "
            "unmodified base model (a residual base, a fine-tuned or a merged one will not do)"
        )
