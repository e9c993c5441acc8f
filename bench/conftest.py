"""``pytest bench/``: its options, and the fixture through which benchmarks measure."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import harness
from bench.report import Report, default_path

# Set before a process starts, these make the C library keep freed blocks, so that fresh outputs cost no page faults.
WARM_ALLOCATOR = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000"}
_report = pytest.StashKey[Report]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="small shapes and few rounds, to see that all of it runs")
    parser.addoption("--rounds", type=int, default=9, help="interleaved rounds of each workload")
    parser.addoption("--bench-json", type=Path, help="where to write the results (default: bench/results/...)")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    config.stash[_report] = Report()
    config.option.benchmark_quiet = True  # pytest-benchmark's own table; ours has the memory and the limits too


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A benchmark that asks for a shape gets those of its module."""
    if "shape" in metafunc.fixturenames:
        shapes = metafunc.module.QUICK_SHAPES if metafunc.config.getoption("quick") else metafunc.module.SHAPES
        metafunc.parametrize("shape", shapes, ids=lambda shape: "x".join(map(str, shape)))


class Bench:
    """What a benchmark is given: the device, sizes for the mode, and where results go."""

    def __init__(self, config: pytest.Config, benchmark: Any) -> None:
        self.config, self.benchmark, self.report = config, benchmark, config.stash[_report]
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.quick = config.getoption("quick")
        self.rounds = 2 if self.quick else config.getoption("rounds")
        warm = os.environ.get("MALLOC_MMAP_MAX_") == "0"
        self.allocator = "warm" if warm else "default"

    def measure(
        self,
        workload: str,
        candidates: Sequence[harness.Candidate],
        *,
        work: float,
        unit: str,
        limit: Callable[[list[float]], float] = min,
    ) -> dict[str, harness.Measurement]:
        """Measure, keep for the tables, and return the measurements by candidate.

        ``work`` is in bytes or FLOP, ``unit`` GB/s or GFLOP/s. Among candidates of the role "limit", ``limit=min``
        takes the fastest of several routes to the same thing, ``limit=max`` the slowest of several things all needed.
        """
        found = harness.measure(
            self.benchmark,
            self._label(workload),
            candidates,
            work=work,
            unit=unit,
            rounds=self.rounds,
            device=self.device,
            allocator=self.allocator,
        )
        limits = [m.median_ms for m in found if m.role == "limit"]
        for measurement in found:
            measurement.limit_ms = limit(limits) if limits else None
        self.report.measurements.extend(found)
        return {m.candidate: m for m in found}

    def target(self, workload: str, what: str, value: float, bound: float, *, at_least: bool = False) -> None:
        """Record a target of the form value <= bound (or >=) for the table of targets; small shapes have none."""
        if self.quick:
            return
        met = value >= bound if at_least else value <= bound
        relation = f"{'>=' if at_least else '<='} {bound}"
        self.report.targets.append(
            {"workload": self._label(workload), "what": what, "value": value, "bound": relation, "met": met}
        )

    def skip_peer(self, name: str, reason: str) -> None:
        """Say in the summary that a peer did not run, and why."""
        self.report.not_run.add(f"{name}: {reason}")

    def run_with_a_warm_allocator(self, file: Path) -> None:
        """Run a file's benchmarks again in a process whose C library keeps freed blocks, and take in its results."""
        if self.allocator == "warm":
            pytest.skip("this is the process with the warm allocator")
        if self.device.type != "cpu":
            pytest.skip("torch's allocator for GPUs is always warm")
        with tempfile.TemporaryDirectory() as directory:
            results = Path(directory) / "warm.json"
            command = [sys.executable, "-m", "pytest", str(file), "-q", "--bench-json", str(results)]
            command += ["--quick"] if self.quick else ["--rounds", str(self.rounds)]
            environment = os.environ | WARM_ALLOCATOR
            self.benchmark.pedantic(
                lambda: subprocess.run(command, check=True, env=environment, cwd=self.config.rootpath)
            )
            self.report.absorb(results)

    def _label(self, workload: str) -> str:
        return workload if self.allocator == "default" else f"{workload}, warm allocator"


@pytest.fixture
def bench(request: pytest.FixtureRequest, benchmark: Any) -> Bench:
    return Bench(request.config, benchmark)


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    report = config.stash[_report]
    if not (report.measurements or report.targets):
        return
    report.write_tables(terminalreporter.write_line, terminalreporter.section)
    path = config.getoption("bench_json")
    if path is None and not config.getoption("quick"):
        path = default_path()
    if path is not None:
        report.save(path)
        terminalreporter.write_line(f"written to {path}")
