"""A short name for the contents of a weight, to tell base models apart."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

_SAMPLES = 1024
_DIGITS = 16


def fingerprint(weight: Tensor) -> str:
    """32 hexadecimal digits: 16 from the shape and 1,024 entries rounded to bfloat16, 16 from them rounded to float16.

    A model and a copy of it in another of float32, bfloat16 and float16 agree in one half at least (`same_weight`),
    whichever was made from which. Two 16-bit copies of a float32 model, one in each format, agree in neither.
    """
    flat = weight.detach().reshape(-1)
    count = min(_SAMPLES, flat.numel())
    stride = (flat.numel() // count) | 1  # odd: an even one would visit few columns
    index = (torch.arange(count, device=flat.device) * stride) % flat.numel()
    sample = flat[index].cpu()
    return "".join(_digest(weight.shape, sample.to(dtype)) for dtype in (torch.bfloat16, torch.float16))


def same_weight(one: str, other: str) -> bool:
    """Whether two fingerprints are of one weight, in one dtype or two. A fine-tuned weight has another."""
    return one[:_DIGITS] == other[:_DIGITS] or one[_DIGITS:] == other[_DIGITS:]


def check_fingerprints(expected: dict[str, str], weights: dict[str, Tensor], what: str) -> None:
    """Raises ValueError if a weight is not the one whose fingerprint was taken."""
    known = {name: fingerprint(weight) for name, weight in weights.items() if name in expected}
    differing = [name for name, found in known.items() if not same_weight(found, expected[name])]
    if differing:
        raise ValueError(
            f"{what} belongs to another base model: the weights of {', '.join(differing[:3])} "
            f"({len(differing)} of {len(weights)} modules) differ from those it was made with. Load the original, "
            "unmodified base model (a residual base, a fine-tuned or a merged one will not do)"
        )


def _digest(shape: torch.Size, sample: Tensor) -> str:
    content = repr((tuple(shape), sample.view(torch.int16).tolist()))
    return hashlib.sha256(content.encode()).hexdigest()[:_DIGITS]
