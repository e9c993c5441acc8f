"""Large buffers on the CPU that outlive a training step.

A fresh 200 MB tensor costs 45 ms of page faults, several times what the kernel that fills it takes, because the C
library returns such blocks to the system as soon as they are freed. The gradient of the logits is such a tensor on
every step; a chunk of logits is another. Here memory is taken in huge pages and kept: once nothing refers to a tensor
any more, the next one of about that size is written into the same pages. At most as much is kept as was in use at one
time.
"""

from __future__ import annotations

import contextlib
import mmap
import threading
import weakref
from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

# The C library keeps freed blocks of less than 32 MiB by itself, but in a heap where large ones leave holes that the
# next may not fit: half of that is where its memory starts to vary.
_MIN_BYTES = 16 << 20
_LARGEST_WASTE = 1.25

# Each block with the view of it that a tensor holds as long as anything refers to that tensor's memory.
_blocks: dict[mmap.mmap, weakref.ref[memoryview]] = {}
_lock = threading.RLock()  # a destructor that the garbage collector runs in here may call empty_cache


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised contiguous tensor, in reused memory where that pays."""
    n_bytes = prod(shape) * dtype.itemsize
    if device.type != "cpu" or n_bytes < _MIN_BYTES or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype, device=device)
    with _lock:
        block = _idle_block(n_bytes) or _new_block(n_bytes)
        view = memoryview(block)
        _blocks[block] = weakref.ref(view)
        return torch.frombuffer(view, dtype=dtype, count=prod(shape)).view(shape)


def empty_cache() -> None:
    """Return to the system the memory of gradients and logits that no tensor uses."""
    with _lock:
        _release_idle_blocks()


def _idle_block(n_bytes: int) -> mmap.mmap | None:
    for block, user in list(_blocks.items()):
        if n_bytes <= len(block) <= _LARGEST_WASTE * n_bytes and user() is None:
            return block
    return None


def _new_block(n_bytes: int) -> mmap.mmap:
    _release_idle_blocks()
    block = mmap.mmap(-1, n_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without huge pages
        block.madvise(mmap.MADV_HUGEPAGE)
    return block


def _release_idle_blocks() -> None:
    for block, user in list(_blocks.items()):
        if user() is None:
            _blocks.pop(block, None)
