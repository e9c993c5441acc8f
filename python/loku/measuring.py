"""Time and peak memory of a call, on the CPU or a GPU."""

from __future__ import annotations

import ctypes
import gc
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import loku_kernels

MIB = 2**20


def timer(device: torch.device) -> Callable[[Callable[[], Any]], float]:
    """A function that runs a call and returns its milliseconds."""
    return _DeviceTimer(device) if device.type == "cuda" else _wall_clock


def _wall_clock(run: Callable[[], Any]) -> float:
    started = time.perf_counter()
    run()
    return (time.perf_counter() - started) * 1e3


class _DeviceTimer:
    """Device events, with the L2 cache flushed before each call.

    The device idles for a while before it, in which the host gets ahead: what is timed is the device's work, not how
    fast Python asks for it, unless the call itself waits for the device.
    """

    HEAD_START = 10_000_000  # clocks, about 5 ms

    def __init__(self, device: torch.device) -> None:
        self.flush = torch.empty(256 * MIB, dtype=torch.int8, device=device)

    def __call__(self, run: Callable[[], Any]) -> float:
        torch.cuda._sleep(self.HEAD_START)
        self.flush.zero_()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)


def peak_memory(run: Callable[[], Any], device: torch.device) -> float:
    """Bytes that a call holds at its peak beyond what was held before it, its result included.

    Memory that earlier calls left with an allocator is given back first, so that using it counts. NaN on a CPU whose
    system does not tell (it is read from Linux's /proc).
    """
    gc.collect()
    loku_kernels.empty_cache()
    if device.type == "cuda":
        return _peak_on_gpu(run, device)
    if not Path("/proc/self/clear_refs").exists():
        return math.nan
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # starts the high-water mark anew
    before = _status("VmRSS")
    run()
    return max(0, _status("VmHWM") - before)


def _peak_on_gpu(run: Callable[[], Any], device: torch.device) -> float:
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {name}")
