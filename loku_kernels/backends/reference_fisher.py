"""The definition of the Fisher accumulations, in plain torch.

A block of rows of ``fisher`` at a time, so that only a block of one sequence's gradient exists.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

# A block of gradients stays in cache between the product that writes it and the sum that squares it.
_BLOCK_BYTES = 1 << 20


def fisher_accumulate(fisher: Tensor, inputs: Tensor, grad_outputs: Tensor, offsets: Tensor, weights: Tensor) -> None:
    """fisher += sum over s of weights[s] * (grad_outputs[s]^T inputs[s])^2, elementwise, in fisher's dtype.

    Args:
        fisher: (out, in), contiguous, float32; float64 for float64 inputs.
        inputs: (T, in), contiguous.
        grad_outputs: (T, out), contiguous, of the dtype of ``inputs``.
        offsets: (S + 1,) int64: sequence s is rows offsets[s] to offsets[s + 1], all within [0, T]; where the second is
            not above the first, it is empty.
        weights: (S,), of the dtype of ``fisher``.
    """
    inputs, grad_outputs = inputs.to(fisher.dtype), grad_outputs.to(fisher.dtype)
    bounds, scales = offsets.tolist(), weights.tolist()
    height = _block_rows(fisher)
    buffer = fisher.new_empty(min(height, len(fisher)), fisher.shape[1])
    for block, grads in zip(fisher.split(height), grad_outputs.split(height, dim=1), strict=True):
        for (begin, end), scale in zip(itertools.pairwise(bounds), scales, strict=True):
            if begin < end:
                gradient = torch.mm(grads[begin:end].t(), inputs[begin:end], out=buffer[: len(block)])
                block.addcmul_(gradient, gradient, value=scale)


def fisher_accumulate_grad(fisher: Tensor, grad: Tensor, scale: float) -> None:
    """fisher += scale * grad^2 in fisher's dtype; both contiguous and of one shape."""
    if grad.dtype == fisher.dtype:
        fisher.addcmul_(grad, grad, value=scale)
        return
    height = _BLOCK_BYTES // fisher.itemsize
    for block, gradient in zip(fisher.view(-1).split(height), grad.view(-1).split(height), strict=True):
        gradient = gradient.to(fisher.dtype)
        block.addcmul_(gradient, gradient, value=scale)


def _block_rows(fisher: Tensor) -> int:
    return max(1, _BLOCK_BYTES // max(1, fisher.shape[1] * fisher.itemsize))
