"""What autograd's graph tells of a tensor whose memory is to be written over."""

from __future__ import annotations

from torch import Tensor

# They give memory that an earlier operation filled another shape.
_VIEWS = ("ViewBackward0", "UnsafeViewBackward0")
# What a head ends with whose gradient is formed from its operands, if from anything.
_SPARING = (
    *("MmBackward0", "AddmmBackward0", "LinearBackward0", "ToCopyBackward0"),
    *("MulBackward0", "DivBackward0", "AddBackward0", "SubBackward0"),
)


def is_compiled(tensor: Tensor) -> bool:
    """Whether a compiled region computed it, which keeps what it likes without autograd's check for changes."""
    return "Compiled" in _producer(tensor)


def gradient_spares(tensor: Tensor) -> bool:
    """Whether what computed it, a linear layer for example, forms its own gradient without it."""
    return _producer(tensor) in _SPARING


def _producer(tensor: Tensor) -> str:
    """The name of the node that filled the tensor's memory, "" of a leaf."""
    node = (tensor if tensor._base is None else tensor._base).grad_fn
    while node is not None and node.name() in _VIEWS:
        node = node.next_functions[0][0]
    return "" if node is None else node.name()
