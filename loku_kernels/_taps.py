"""Small autograd functions that let hooks listen to a frozen model."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor


def require_grad(tensor: Tensor) -> Tensor:
    """A copy that requires a gradient, which goes nowhere. A view would forbid models to change it in place."""
    return _RequireGrad.apply(tensor, _anchor())


def as_computed(output: Tensor) -> Tensor:
    """What a linear layer computed before it gave it the shape of ``output``, which is a view of it where there is a
    bias. Hooks of a view are lost when the model changes it in place (relu_), those of its base are not."""
    base = output._base
    return output if base is None or base.shape[-1:] != output.shape[-1:] or base.numel() != output.numel() else base


def keep(tensor: Tensor) -> Tensor:
    """A token for ``tensor``, held as autograd holds what it saves: checkpointing drops it and makes it anew."""
    return _Saved.apply(tensor, _anchor())


def kept(token: Tensor) -> Tensor:
    return token.grad_fn.saved_tensors[0].detach()


class _RequireGrad(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, anchor: Tensor) -> Tensor:
        return tensor.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None]:
        return None, None


class _Saved(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, anchor: Tensor) -> Tensor:
        ctx.save_for_backward(tensor)
        return tensor.new_empty(0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None]:
        return None, None


@functools.cache
def _anchor() -> Tensor:
    """Autograd records only what depends on something that requires a gradient."""
    return torch.zeros((), requires_grad=True)
