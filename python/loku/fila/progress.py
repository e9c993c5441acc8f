"""A progress bar that counts modules and shows memory."""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

import torch
from tqdm.auto import tqdm

T = TypeVar("T")


def progress(
    items: Iterable[T], what: str, unit: str, show: bool = True, modules: int = 0, total: int | None = None
) -> Iterator[T]:
    """Yields the items, showing how many a second and the peak memory (of the GPU where there is one).

    Where an item stands for work on several modules, also modules a second.
    """
    with tqdm(items, desc=what, unit=unit, total=total, disable=not show) as bar:
        for item in bar:
            yield item
            rate = bar.format_dict["rate"] if modules and show else None
            shown = f"{modules * rate:.0f} module/s, " if rate else ""
            bar.set_postfix_str(f"{shown}peak {peak_memory() / 2**30:.1f} GiB", refresh=False)


def peak_memory() -> int:
    """Bytes: the most that torch has held on the current GPU, else the most that the process has held."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
