"""Diagonal Fisher information, accumulated from what passes through a layer: no sequence's gradient is ever stored."""

from __future__ import annotations

import torch
from torch import Tensor

from loku_kernels import _validation as check
from loku_kernels.backends.reference import compute_dtype
from loku_kernels.ops import fisher as ops

_INTEGER = (torch.int64, torch.int32)


@torch.no_grad()
def fisher_accumulate(
    fisher: Tensor,
    inputs: Tensor,
    grad_outputs: Tensor,
    *,
    offsets: Tensor | None = None,
    weights: Tensor | None = None,
) -> None:
    """Add squared per-sequence gradients of a linear layer's weight to ``fisher``, in place:

        fisher += sum over s of weights[s] * (sum over tokens t of s of outer(grad_outputs[t], inputs[t]))^2

    elementwise. Products and sums are float32 (float64 for float64 inputs).

    Args:
        fisher: (out, in) float32, contiguous; float64 for float64 inputs. For a weight stored as (in, out), pass an
            (in, out) accumulator and exchange ``inputs`` and ``grad_outputs``.
        inputs: (tokens, in) or (batch, tokens, in), what the layer was given; float32, bfloat16, float16, or float64
            (by the plain-torch reference).
        grad_outputs: the same shape, ending in ``out``: the gradient at the layer's output, of the dtype of ``inputs``.
        offsets: (S + 1,) int64 or int32. Sequence s is tokens offsets[s] to offsets[s + 1], counted through the whole
            batch. They start at 0, do not decrease and end at the number of tokens; an empty sequence adds nothing.
            Without them each row of the batch is one sequence, and 2-D inputs are one sequence.
        weights: (S,) floating point, 1 where not given.

    Raises:
        TypeError: a dtype that is not served.
        ValueError: shapes or devices that do not fit, a ``fisher`` that is not contiguous, or offsets that do not
            cover the tokens. On a GPU the values of offsets are not checked, as that would wait for the device: there
            they are clamped to [0, tokens], a sequence that ends before it starts is empty, and nothing is read out of
            bounds.

    Memory: nothing of the size of fisher, let alone one per sequence. Infinite and NaN gradients end up in ``fisher``.
    """
    check.check_floating(inputs=inputs, grad_outputs=grad_outputs)
    if inputs.dim() not in (2, 3):
        raise ValueError(f"inputs must be (tokens, in) or (batch, tokens, in), but has shape {tuple(inputs.shape)}")
    if grad_outputs.shape[:-1] != inputs.shape[:-1] or grad_outputs.dim() != inputs.dim():
        raise ValueError(
            f"grad_outputs must have the shape of inputs {tuple(inputs.shape)} but for the last dimension, "
            f"but has shape {tuple(grad_outputs.shape)}"
        )
    _check_fisher(fisher, compute_dtype(inputs.dtype), (grad_outputs.shape[-1], inputs.shape[-1]))
    tokens = inputs.shape[:-1].numel()
    if offsets is None:
        offsets = _row_offsets(inputs)
    elif not isinstance(offsets, Tensor) or offsets.dtype not in _INTEGER:
        raise TypeError(f"offsets must be an int64 or int32 tensor, but is {_kind(offsets)}")
    elif offsets.dim() != 1 or len(offsets) == 0:
        raise ValueError(f"offsets must have shape (sequences + 1,), but has shape {tuple(offsets.shape)}")
    sequences = len(offsets) - 1
    if weights is None:
        weights = torch.ones(sequences, dtype=fisher.dtype, device=inputs.device)
    elif not isinstance(weights, Tensor) or not weights.is_floating_point():
        raise TypeError(f"weights must be a floating-point tensor, but is {_kind(weights)}")
    elif weights.shape != (sequences,):
        raise ValueError(f"weights must have one entry per sequence, ({sequences},), but has {tuple(weights.shape)}")
    check.check_same_device(inputs=inputs, grad_outputs=grad_outputs, fisher=fisher, offsets=offsets, weights=weights)
    ops.fisher_accumulate(
        fisher,
        inputs.reshape(tokens, inputs.shape[-1]),
        grad_outputs.reshape(tokens, grad_outputs.shape[-1]),
        offsets.to(torch.int64),
        weights.to(fisher.dtype),
    )


@torch.no_grad()
def fisher_accumulate_grad(fisher: Tensor, grad: Tensor, scale: float = 1.0) -> None:
    """fisher += scale * grad^2, elementwise, in place and in float32, from a gradient at hand.

    For parameters other than a linear layer's weight, and for gradients of a whole batch.

    Args:
        fisher: any shape, contiguous, float32 (or float64 for a float64 gradient).
        grad: of the shape of ``fisher``; float32, bfloat16, float16 or float64.
        scale: a number.

    Raises:
        TypeError: a dtype that is not served.
        ValueError: shapes or devices that do not fit, or a ``fisher`` that is not contiguous.
    """
    check.check_floating(grad=grad)
    _check_fisher(fisher, compute_dtype(grad.dtype), tuple(grad.shape))
    check.check_same_device(grad=grad, fisher=fisher)
    ops.fisher_accumulate_grad(fisher, grad, float(scale))


def _check_fisher(fisher: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if not isinstance(fisher, Tensor) or fisher.dtype != dtype:
        raise TypeError(f"fisher must be a {dtype} tensor, but is {_kind(fisher)}")
    if fisher.shape != shape:
        raise ValueError(f"fisher must have shape {shape}, but has shape {tuple(fisher.shape)}")
    if not fisher.is_contiguous():
        raise ValueError(f"fisher must be contiguous, but has strides {fisher.stride()}")


def _row_offsets(inputs: Tensor) -> Tensor:
    rows, length = (1, len(inputs)) if inputs.dim() == 2 else inputs.shape[:2]
    return torch.arange(rows + 1, device=inputs.device) * length


def _kind(value: object) -> str:
    return str(value.dtype) if isinstance(value, Tensor) else type(value).__name__
