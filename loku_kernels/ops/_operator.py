"""Registration of operators, without what ``torch.library.custom_op`` adds to every call.

Its wrappers in Python take 0.05 to 0.13 ms a call when the caches are cold, as they are after a layer of a model: a
quarter of ``fisher_accumulate_grad`` on 3072 x 768.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from loku_kernels.gemm import without_autocast

_NAMESPACE = "loku_kernels"


def operator(function: Callable) -> torch._ops.OpOverload:
    """Make the decorated function an operator of its name, with the schema that its annotations say; none mutated.

    A fake implementation and a gradient are registered under ``name()`` of what comes back.
    """
    return _register(function, ())


def operator_of_products(function: Callable) -> torch._ops.OpOverload:
    """The same for a function that multiplies matrices, in the dtypes that it is given: autocast has had its say, and
    the one in force around a backward pass may be another than that around the forward pass."""

    def as_given(tensor: Tensor, *arguments: Any) -> Any:
        with without_autocast(tensor.device):
            return function(tensor, *arguments)

    return _register(function, (), as_given)


def operator_on(argument: str) -> Callable[[Callable], torch._ops.OpOverload]:
    """The same for a function that writes over one argument, its first, and returns nothing."""

    def decorate(function: Callable) -> torch._ops.OpOverload:
        def counted(tensor: Tensor, *arguments: Any) -> None:
            function(tensor, *arguments)
            if not tensor.is_inference():
                torch.autograd.graph.increment_version(tensor)

        return _register(function, (argument,), counted)

    return decorate


def refuse_gradient(operator: torch._ops.OpOverload) -> None:
    """Make the operator, itself a gradient, raise where it is differentiated."""

    def refuse(ctx: Any, *gradients: Any) -> None:
        raise RuntimeError(f"{operator.name()} has no gradient: losses can be differentiated once")

    torch.library.register_autograd(operator.name(), refuse)


def _register(function: Callable, mutated: tuple[str, ...], kernel: Callable | None = None) -> torch._ops.OpOverload:
    name = f"{_NAMESPACE}::{function.__name__}"
    schema = torch.library.infer_schema(function, mutates_args=mutated)
    torch.library.define(name, schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(name, "CompositeExplicitAutograd")(kernel or function)
    return getattr(getattr(torch.ops, _NAMESPACE), function.__name__).default
