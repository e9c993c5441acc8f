"""Operators that add squared gradients to a Fisher accumulator in place. They have no gradient of their own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from loku_kernels.backends import reference_fisher, select
from loku_kernels.ops._operator import operator_on


@operator_on("fisher")
def fisher_accumulate(fisher: Tensor, inputs: Tensor, grad_outputs: Tensor, offsets: Tensor, weights: Tensor) -> None:
    """fisher (out, in) += sum over s of weights[s] * (grad_outputs[s]^T inputs[s])^2, s = rows offsets[s]:offsets[s+1].

    ``inputs`` is (T, in), ``grad_outputs`` (T, out), ``offsets`` (S + 1,) int64, ``weights`` (S,) in fisher's dtype.
    """
    check_offsets(offsets, len(inputs))
    if offsets.device.type != "cpu":
        # Unchecked, as a look at them would wait for the device; so made harmless.
        offsets = offsets.clamp(0, len(inputs))
    _backend(inputs).fisher_accumulate(
        fisher, inputs.contiguous(), grad_outputs.contiguous(), offsets.contiguous(), weights.contiguous()
    )


@torch.library.register_fake(fisher_accumulate.name())
def _(fisher, inputs, grad_outputs, offsets, weights):
    return None


@operator_on("fisher")
def fisher_accumulate_grad(fisher: Tensor, grad: Tensor, scale: float) -> None:
    """fisher += scale * grad^2, elementwise."""
    _backend(grad).fisher_accumulate_grad(fisher, grad.contiguous(), scale)


@torch.library.register_fake(fisher_accumulate_grad.name())
def _(fisher, grad, scale):
    return None


def check_offsets(offsets: Tensor, tokens: int) -> None:
    """Refuse offsets that do not cover the tokens where looking costs no synchronisation (on the CPU)."""
    if offsets.device.type != "cpu":
        return
    first, last = int(offsets[0]), int(offsets[-1])
    if first != 0:
        raise ValueError(f"offsets must start at 0, but start at {first}")
    if last != tokens:
        raise ValueError(f"offsets must end at the number of tokens, {tokens}, but end at {last}")
    falls = offsets[1:] < offsets[:-1]
    if falls.any():
        at = int(falls.nonzero()[0])
        raise ValueError(
            f"offsets must not decrease, but offsets[{at}] is {int(offsets[at])} and "
            f"offsets[{at + 1}] is {int(offsets[at + 1])}"
        )


def _backend(tensor: Tensor) -> Any:
    backend = select(tensor)
    return backend if hasattr(backend, "fisher_accumulate") else reference_fisher
