"""Checks and conversions that the public functions share. None of them looks at a tensor's values."""

from __future__ import annotations

from numbers import Integral, Real

import torch
from torch import Tensor
from torch.autograd import forward_ad

_FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_INTEGER = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8)
_OPTIONAL = ("bias", "rows")
_LARGEST_SOFTCAP = 1e30  # quotients by a larger one may be subnormal in float32
REDUCTIONS = ("none", "mean", "sum")


def check_tensors(**tensors: Tensor | None) -> None:
    """TypeError unless all are tensors, or None of the optional ones."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) and not (tensor is None and name in _OPTIONAL):
            raise TypeError(f"{name} must be a torch.Tensor, but a {type(tensor).__name__} was given")


def check_integer(name: str, value: int) -> None:
    if not isinstance(value, Integral):
        raise TypeError(f"{name} must be an integer, but is {value!r}")
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ValueError(f"{name} must fit into 64 bits, but is {value}")


def check_floating(**tensors: Tensor | None) -> None:
    """TypeError unless every tensor is a floating-point tensor of a dtype that the kernels serve, and of one dtype."""
    check_tensors(**tensors)
    first_name, first = next(iter(tensors.items()))
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.dtype not in _FLOATING:
            raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, but is {tensor.dtype}")
        if tensor.layout != torch.strided:
            raise TypeError(f"{name} must be dense, but its layout is {tensor.layout}")
        if tensor.dtype != first.dtype:
            raise TypeError(f"{name} must have the dtype of {first_name} ({first.dtype}), but is {tensor.dtype}")
        if not torch.compiler.is_compiling() and forward_ad.unpack_dual(tensor).tangent is not None:
            raise RuntimeError(f"{name} carries a tangent of forward-mode differentiation, which is not defined here")


def check_same_device(**tensors: Tensor | None) -> None:
    """ValueError unless all the tensors are on one device."""
    first_name, first = next(iter(tensors.items()))
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != first.device:
            raise ValueError(
                f"{name} must be on the device of {first_name} ({first.device}), but is on {tensor.device}"
            )


def check_labels(labels: Tensor, expected_shape: torch.Size, source: str) -> None:
    """``labels`` must be an integer tensor with one entry for every row of ``source``."""
    check_tensors(labels=labels)
    if labels.dtype not in _INTEGER:
        raise TypeError(f"labels must be an integer tensor, but is {labels.dtype}")
    if labels.shape != expected_shape:
        raise ValueError(
            f"labels must have the shape of {source} without its last dimension, {tuple(expected_shape)}, "
            f"but has shape {tuple(labels.shape)}"
        )


def check_writable(logits: Tensor) -> None:
    """ValueError unless every logit has a place of its own, in rows of adjacent elements."""
    if logits.stride(-1) != 1:
        raise ValueError(
            f"inplace needs logits whose last dimension has stride 1, but the strides are {logits.stride()}"
        )
    reach = 0
    for stride, size in sorted((a, b) for a, b in zip(logits.stride(), logits.shape, strict=True) if b > 1):
        if stride <= reach:
            raise ValueError(
                f"inplace needs logits that share no memory with each other, but shape {tuple(logits.shape)} has the "
                f"strides {logits.stride()}"
            )
        reach += (size - 1) * stride


def check_vocabulary(argument: str, vocabulary: int) -> None:
    if vocabulary < 2:
        raise ValueError(f"{argument} must cover a vocabulary of at least 2 entries, but covers {vocabulary}")


def check_reduction(reduction: str, num_items_in_batch: float | Tensor | None) -> None:
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, but is {reduction!r}")
    if num_items_in_batch is not None and reduction != "mean":
        raise ValueError(f"num_items_in_batch is the divisor of reduction='mean', but reduction is {reduction!r}")
    if not isinstance(num_items_in_batch, (Real, Tensor, torch.SymInt, torch.SymFloat, type(None))):
        raise TypeError(f"num_items_in_batch must be a number or a tensor, but is {num_items_in_batch!r}")
    if isinstance(num_items_in_batch, Tensor) and num_items_in_batch.is_complex():
        raise TypeError(f"num_items_in_batch must be real, but is {num_items_in_batch.dtype}")
    if isinstance(num_items_in_batch, Tensor) and num_items_in_batch.dim() > 0:
        raise ValueError(
            f"num_items_in_batch must be one number, but has shape {tuple(num_items_in_batch.shape)}: reshape it to ()"
        )


def check_transform(logit_scale: float, logit_softcap: float | None) -> float:
    """The soft cap as the operators take it: 0 for none."""
    if not isinstance(logit_scale, Real):
        raise TypeError(f"logit_scale must be a number, but is {logit_scale!r}")
    if logit_scale == 0 or not abs(logit_scale) <= torch.finfo(torch.float32).max:
        raise ValueError(f"logit_scale must be finite in float32, and not 0, but is {logit_scale}")
    if not isinstance(logit_softcap, (Real, type(None))):
        raise TypeError(f"logit_softcap must be a number, or None for none, but is {logit_softcap!r}")
    if logit_softcap is not None and not 0 < logit_softcap <= _LARGEST_SOFTCAP:
        raise ValueError(
            f"logit_softcap must be positive and at most {_LARGEST_SOFTCAP:g}, or None for none, but is {logit_softcap}"
        )
    return 0.0 if logit_softcap is None else float(logit_softcap)


def flat_labels(labels: Tensor, ignore_index: int, shift_labels: bool) -> Tensor:
    """Labels as one int64 row; shifted, position t is scored against label t + 1 and the last against none."""
    check_integer("ignore_index", ignore_index)
    if shift_labels:
        if labels.dim() == 0:
            raise ValueError("shift_labels needs labels with a sequence dimension, but labels is a scalar")
        if labels.shape[-1] > 0:  # in int64, as a smaller type may not hold ignore_index
            labels = torch.nn.functional.pad(labels[..., 1:].to(torch.int64), (0, 1), value=ignore_index)
    return labels.reshape(-1).to(torch.int64).contiguous()  # a strided vector stays one under reshape


def row_weights(name: str, weight: float | Tensor, labels: Tensor, dtype: torch.dtype) -> tuple[Tensor | None, float]:
    """Weights of rows as the operators take them: a tensor, which has to broadcast to the labels' shape, times a
    factor. A number is a factor alone: a tensor of it would take a kernel of its own."""
    if not isinstance(weight, Tensor):
        if not isinstance(weight, Real):
            raise TypeError(f"{name} must be a number or a tensor, but a {type(weight).__name__} was given")
        if torch.compiler.is_compiling():  # it may be a symbol, which no operator takes as a number
            return torch.full((), weight, dtype=dtype, device=labels.device).expand(labels.numel()), 1.0
        if not abs(weight) <= torch.finfo(dtype).max:
            raise ValueError(f"{name} must be a finite number that {dtype} can hold, but is {weight}")
        return None, float(weight)
    if weight.is_complex():
        raise TypeError(f"{name} must be real, but is {weight.dtype}")
    if weight.requires_grad:
        raise ValueError(f"{name} is a constant of the loss and gets no gradient: pass {name}.detach()")
    trailing = labels.shape[labels.dim() - weight.dim() :]
    if weight.dim() > labels.dim() or any(w not in (1, n) for w, n in zip(weight.shape, trailing, strict=True)):
        raise ValueError(
            f"{name} must broadcast to the shape of labels {tuple(labels.shape)}, but has {tuple(weight.shape)}"
        )
    check_same_device(labels=labels, **{name: weight})
    return weight.to(dtype).expand(labels.shape).reshape(-1), 1.0
