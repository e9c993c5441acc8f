"""What a run leaves behind: tables in the terminal, and the same as JSON."""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import chain, count, groupby
from pathlib import Path
from typing import Any

import torch

from bench.harness import Measurement
from loku.provenance import commit, driver, hardware, versions

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("loku-kernels", "torch", "triton", "liger-kernel", "cut-cross-entropy")


@dataclass
class Report:
    """All that one run found."""

    measurements: list[Measurement] = field(default_factory=list)
    targets: list[dict[str, Any]] = field(default_factory=list)
    not_run: set[str] = field(default_factory=set)

    def write_tables(self, write: Callable[[str], None], section: Callable[[str], None]) -> None:
        section("measurements")
        write(f"{hardware()}, torch {torch.__version__}, {torch.get_num_threads()} threads")
        write("medians of interleaved rounds; spread: the middle half of the rounds; MiB: peak beyond the inputs")
        for workload, group in groupby(self.measurements, key=lambda m: m.workload):
            _write_table(write, workload, list(group))
        section("targets")
        for t in self.targets:
            found = f"{t['what']}: {t['value']:.3g} ({t['bound']})"
            write(f"{'met   ' if t['met'] else 'missed'} {t['workload']:<58} {found}")
        for line in sorted(self.not_run):
            write(f"not run  {line}")

    def save(self, path: Path) -> None:
        """As JSON; under a temporary name first, so that no reader sees half a file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        results = {
            "hardware": hardware(),
            "driver": driver(),
            "threads": torch.get_num_threads(),
            "versions": versions(PACKAGES),
            "commit": commit(),
            "date": datetime.date.today().isoformat(),
            "measurements": [m.to_json() for m in self.measurements],
            "targets": self.targets,
            "not_run": sorted(self.not_run),
        }
        temporary = path.with_suffix(".partial")
        temporary.write_text(json.dumps(results, indent=1))
        temporary.replace(path)

    def absorb(self, path: Path) -> None:
        """Take in what another process saved."""
        results = json.loads(path.read_text())
        self.measurements.extend(map(Measurement.from_json, results["measurements"]))
        self.targets.extend(results["targets"])
        self.not_run.update(results["not_run"])


def default_path() -> Path:
    """Named for the hardware, the day and the commit; numbered where there is such a file."""
    slug = re.sub(r"[^a-z0-9]+", "-", hardware().lower()).strip("-")
    name = f"{slug}-{datetime.date.today().isoformat()}-{commit()}"
    numbered = (RESULTS / f"{name}{suffix}.json" for suffix in chain([""], (f"-{n}" for n in count(2))))
    return next(path for path in numbered if not path.exists())


def _write_table(write: Callable[[str], None], workload: str, group: list[Measurement]) -> None:
    ours = next((m.median_ms for m in group if m.role == "ours"), None)
    heading = f"{'ms':>9}{'spread':>8}{'/ ours':>8}{group[0].unit:>10}{'MiB':>8}{'of limit':>10}"
    write("")
    write(f"{workload:<64}{heading}")
    for m in group:
        relative = "" if ours is None else f"{m.median_ms / ours:.2f}"
        quality = "".join(f"  {name} {value:.1e}" for name, value in m.quality.items())
        share = "" if m.share_of_limit is None else f"{m.share_of_limit:.0%}"
        write(
            f"  {m.role:<6}{m.candidate:<56}{m.median_ms:>9.2f}{m.spread:>8.0%}{relative:>8}{m.rate:>10.1f}"
            f"{m.peak_mib:>8.0f}{share:>10}{quality}"
        )
