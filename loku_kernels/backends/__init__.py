"""Which implementation runs an operation: Triton on GPUs, C++ on CPUs, and the plain-torch reference otherwise.

A backend is an object or module with the functions that ``reference`` defines. Choosing depends on the device and dtype
of the logits alone; ``use`` overrides it for a block of code, which is how tests and benchmarks reach each one.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import warnings
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from loku_kernels.backends import cpp, reference

_override: ContextVar[str | None] = ContextVar("loku_kernels_backend", default=None)


def available() -> dict[str, str | None]:
    """Every backend that exists, and why it cannot be used here (None where it can)."""
    return {
        "reference": None,
        "cpp": cpp.missing_reason(),
        **{f"cpp:{name}": None for name in cpp.instruction_sets()},
        "triton": _triton_missing_reason(),
    }


@contextlib.contextmanager
def use(name: str) -> Iterator[None]:
    """Run the block's operations on one backend: "reference", "cpp", "cpp:<instruction set>" or "triton".

    Raises:
        ValueError: there is no such backend, or it cannot be used on this machine; the message says why.
    """
    _load(name)
    token = _override.set(name)
    try:
        yield
    finally:
        _override.reset(token)


def select(tensor: Tensor) -> Any:
    """The backend for an operation on ``tensor``. float64 is the reference's alone."""
    if tensor.dtype == torch.float64:
        return reference
    name = _override.get()
    if name is None:
        name = _default(tensor.device.type)
    return _load(name)


def first_invalid_label(labels: Tensor, vocabulary: int, ignore_index: int) -> int:
    """The first of (N,) int64 labels on the CPU that is neither in [0, vocabulary) nor ``ignore_index``, or -1."""
    if cpp.missing_reason() is None:  # a kernel where torch would take six, on every call
        return torch.ops.loku_kernels_cpp.first_invalid_label(labels, vocabulary, ignore_index)
    return reference.first_invalid_label(labels, vocabulary, ignore_index)


@functools.cache
def _default(device_type: str) -> str:
    preferred = "cpp" if device_type == "cpu" else "triton"
    reason = available()[preferred] if device_type in ("cpu", "cuda") else f"no kernels for {device_type}"
    if reason is None:
        return preferred
    warnings.warn(
        f"loku_kernels runs on its slow plain-torch reference for {device_type} tensors: {reason}. "
        "`python -m loku_kernels` shows what was found.",
        stacklevel=2,
    )
    return "reference"


@functools.cache
def _load(name: str) -> Any:
    reason = available().get(name, "there is no such backend")
    if reason is not None:
        usable = ", ".join(key for key, why in available().items() if why is None)
        raise ValueError(f"backend {name!r} cannot be used: {reason} (usable here: {usable})")
    if name == "reference":
        return reference
    if name == "triton":
        from loku_kernels.backends import triton

        return triton
    return cpp.CppBackend(name.partition(":")[2] or None)


def _triton_missing_reason() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        return "torch sees no CUDA device (TRITON_INTERPRET=1 runs the kernels in Triton's interpreter)"
    return None
