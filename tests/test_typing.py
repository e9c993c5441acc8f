"""What a type checker is told of the losses is what they take: their overloads name the options a second time."""

from __future__ import annotations

import inspect
from typing import get_args, get_overloads, get_type_hints

import pytest

import loku_kernels

LOSSES = [name for name in loku_kernels.__all__ if name.startswith("fused_")]


@pytest.mark.parametrize("name", LOSSES)
def test_overloads_take_what_the_loss_takes(name):
    loss = getattr(loku_kernels, name)
    expected = get_type_hints(loss)
    result = expected.pop("return")
    one, both = get_args(result)
    kinds = []
    for overload in get_overloads(loss):
        hints = get_type_hints(overload)
        (options,) = get_args(hints.pop("options"))
        kinds.append((hints.pop("return_statistics"), hints.pop("return")))
        assert hints | get_type_hints(options) | {"return_statistics": bool} == expected
    assert [(get_args(kind), returned) for kind, returned in kinds] == [((False,), one), ((True,), both), ((), result)]
    assert inspect.Parameter.VAR_KEYWORD not in {p.kind for p in inspect.signature(loss).parameters.values()}
