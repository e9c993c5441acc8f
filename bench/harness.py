"""Measure candidates for one piece of work side by side: checked first, then for memory, then in interleaved rounds.

Foreign load and clock changes hit all candidates of a round alike, so ratios between their medians are what to trust.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

import torch

from loku.measuring import MIB, peak_memory, timer


def _nothing() -> None:
    pass


@dataclass
class Candidate:
    """One way of doing the work. ``role`` is "ours", "limit" or "peer"."""

    name: str
    role: str
    run: Callable[[], Any]
    every: int = 1
    """Take part in every n-th round only, for candidates that are too slow for all."""
    check: Callable[[Any], None] | None = None
    """Raises if what ``run`` returned is wrong."""
    prepare: Callable[[], Any] = _nothing
    """Called before each run, untimed: restores inputs that the run overwrites."""

    def call(self) -> Any:
        self.prepare()
        return self.run()


@dataclass
class Measurement:
    """What was found: milliseconds a round, and the memory that a call needs beyond what was allocated before it."""

    DERIVED: ClassVar = ("median_ms", "spread", "rate", "share_of_limit")

    workload: str
    candidate: str
    role: str
    work: float
    unit: str
    times_ms: list[float] = field(default_factory=list)
    peak_mib: float = 0.0
    allocator: str = "default"
    limit_ms: float | None = None
    """What the physical limits of the workload allow."""
    quality: dict[str, float] = field(default_factory=dict)
    """Of an approximation: how good it is, by name."""

    @property
    def median_ms(self) -> float:
        return statistics.median(self.times_ms)

    @property
    def spread(self) -> float:
        """Half of the rounds lie within this range, relative to the median."""
        if len(self.times_ms) < 2:
            return 0.0
        quartiles = statistics.quantiles(self.times_ms, n=4, method="inclusive")
        return (quartiles[2] - quartiles[0]) / self.median_ms

    @property
    def rate(self) -> float:
        """GB/s or GFLOP/s."""
        return self.work / self.median_ms / 1e6

    @property
    def share_of_limit(self) -> float | None:
        return None if self.limit_ms is None else self.limit_ms / self.median_ms

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {name: getattr(self, name) for name in self.DERIVED}

    @classmethod
    def from_json(cls, entry: dict[str, Any]) -> Measurement:
        return cls(**{name: value for name, value in entry.items() if name not in cls.DERIVED})


def measure(
    benchmark: Any,
    workload: str,
    candidates: Sequence[Candidate],
    *,
    work: float,
    unit: str,
    rounds: int,
    device: torch.device,
    allocator: str,
) -> list[Measurement]:
    """Check what every candidate computes, find its peak memory, and time all of them in rounds.

    In each round every candidate has one turn, a different one first each time.
    """
    time = timer(device)
    found = [Measurement(workload, c.name, c.role, work, unit, allocator=allocator) for c in candidates]
    for candidate, measurement in zip(candidates, found, strict=True):
        result = candidate.call()
        if candidate.check is not None:
            candidate.check(result)
        del result
        candidate.prepare()
        measurement.peak_mib = peak_memory(candidate.run, device) / MIB
    turns = list(zip(candidates, found, strict=True))
    for candidate in candidates:  # The search for the peak emptied the caches of allocators.
        if candidate.every == 1:
            candidate.call()
    for number in range(rounds):
        first = number % len(turns)
        for candidate, measurement in turns[first:] + turns[:first]:
            if number % candidate.every == 0:
                candidate.prepare()
                measurement.times_ms.append(time(candidate.run))
    _tell(benchmark, found)
    return found


def _tell(benchmark: Any, found: Sequence[Measurement]) -> None:
    """Give pytest-benchmark an entry for each candidate, of times that are known already.

    It has no public way in for those; its fixture stands for one entry, so every candidate has a copy.
    """
    benchmark._mode = "interleaved"
    if not benchmark.enabled:
        return
    for measurement in found:
        entry = copy.copy(benchmark)
        entry.group, entry.name = measurement.workload, measurement.candidate
        entry.fullname = f"{benchmark.fullname}::{measurement.candidate}"
        entry.extra_info = {"role": measurement.role, "peak_mib": measurement.peak_mib}
        stats = entry._make_stats(iterations=1)
        for milliseconds in measurement.times_ms:
            stats.update(milliseconds / 1e3)


def leaf(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as a tensor that collects a gradient."""
    return tensor.detach().requires_grad_()


def forward_backward(
    loss: Callable[[], torch.Tensor], *leaves: torch.Tensor
) -> Callable[[], tuple[torch.Tensor, tuple[torch.Tensor, ...]]]:
    """A call of ``loss`` and its backward pass: the loss and the gradients of the leaves."""

    def run() -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        value = loss()
        return value.detach(), torch.autograd.grad(value, leaves)

    return run
