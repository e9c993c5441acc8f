"""Compile every Triton kernel, in every configuration that the launch rules can choose, on a machine without a GPU.

    python tools/compile_kernels.py [--kernel NAME] [--arch 90]

Prints registers, shared memory, spills, the widths of the global loads and stores inside loops, and what multiplies
matrices there. Fails on a spill, on a load or store narrower than 128 bits in a loop that is meant to be wide, where as
many programs as are meant to share a multiprocessor do not fit its registers, or where the tensor cores are meant to be
used and are not. A module of ``loku_kernels.backends.triton`` takes part by having ``compile_configurations()``.
"""

from __future__ import annotations

import argparse
import importlib
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from loku_kernels.backends import triton as kernels
from loku_kernels.backends.triton.configurations import Configuration
from loku_kernels.backends.triton.launch import INTERPRETED, WARP

ARCHITECTURES = (80, 90, 100)
REGISTERS = 1 << 16  # of a multiprocessor
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"

INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]+\*/\s+(.*?);")
LABEL = re.compile(r"\s*(\.L_x_\d+):")
BRANCH = re.compile(r"\bBRA\b.*`\((\.L_x_\d+)\)")
DIVERGENCE = re.compile(r"\bBRA\.DIV\b.*`\((\.L_x_\d+)\)")
LOAD = re.compile(r"\bLDG\.[A-Z0-9_.]*")
LOAD_TO_SHARED = re.compile(r"\bLDGSTS\.[A-Z0-9_.]*")
STORE = re.compile(r"\bSTG\.[A-Z0-9_.]*")
MATRIX_PRODUCT = re.compile(r"\b(?:HMMA|HGMMA|UTCHMMA)[A-Za-z0-9_.]*")
WORK = re.compile("|".join(pattern.pattern for pattern in (LOAD, LOAD_TO_SHARED, STORE, MATRIX_PRODUCT)))
SPILL = re.compile(r"\b(?:LDL|STL)\b")


class Widths(NamedTuple):
    """Global accesses inside loops."""

    loads: int
    wide_loads: int
    stores: int
    wide_stores: int

    def __str__(self) -> str:
        return f"{self.wide_loads}/{self.loads} {self.wide_stores}/{self.stores}"


class Report(NamedTuple):
    """What the compiler made of one configuration on one architecture."""

    registers: int
    shared: int
    spills: int
    widths: Widths
    products: Counter[str]  # matrix instructions inside loops, by name


def configurations() -> list[Configuration]:
    """Those of every kernel module, in the modules' order."""
    names = [module.name for module in pkgutil.iter_modules(kernels.__path__, kernels.__name__ + ".")]
    modules = [importlib.import_module(name) for name in names]
    return [
        c for module in modules if hasattr(module, "compile_configurations") for c in module.compile_configurations()
    ]


def compile_one(index: int, architecture: int) -> Report:
    """Compile the configuration of that index, and read the result. Kernels cannot be pickled; indices can."""
    configuration = configurations()[index]
    names = configuration.kernel.arg_names
    signature = {name: configuration.types.get(name, "constexpr") for name in names}
    constants = {name: value for name, value in configuration.launch.items() if name in names}
    options = {name: value for name, value in configuration.launch.items() if name not in names}
    source = ASTSource(configuration.kernel, signature, constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        report = read_report(
            _output("cuobjdump", "--dump-resource-usage", file.name), _output("nvdisasm", "-c", file.name)
        )
    return report._replace(shared=compiled.metadata.shared)  # the binary knows only what is not chosen at launch


def read_report(usage: str, sass: str) -> Report:
    """From what cuobjdump and nvdisasm print."""
    resources = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
    spills = resources["STACK"] + resources["LOCAL"] + len(SPILL.findall(sass))
    looped = list(instructions_in_loops(sass))
    # A loop that copies tiles to shared memory loads nothing else but scalars.
    loads = LOAD_TO_SHARED.findall("\n".join(looped)) or LOAD.findall("\n".join(looped))
    stores = [match for line in looped for match in STORE.findall(line)]
    widths = Widths(len(loads), sum(".128" in x for x in loads), len(stores), sum(".128" in x for x in stores))
    products = Counter(MATRIX_PRODUCT.findall("\n".join(looped)))
    return Report(resources["REG"], resources["SHARED"], spills, widths, products)


def instructions_in_loops(sass: str) -> Iterator[str]:
    """The instructions between a label and the last branch back to it, of loops that hold no other loop.

    Loops that only wait, for a barrier say, do not count as loops, nor the way back from where a warp that has diverged
    goes, which lies behind everything else.
    """
    instructions: list[str] = []
    labels: dict[str, int] = {}
    loops: dict[int, int] = {}
    diverged, place = set(DIVERGENCE.findall(sass)), ""
    for line in sass.splitlines():
        if label := LABEL.match(line):
            place = label[1]
            labels[place] = len(instructions)
        elif instruction := INSTRUCTION.match(line):
            instructions.append(instruction[1])
            branch = BRANCH.search(instruction[1])
            if branch and branch[1] in labels and place not in diverged:
                loops[labels[branch[1]]] = len(instructions)
    working = {start: end for start, end in loops.items() if any(map(WORK.search, instructions[start:end]))}
    for start, end in sorted(working.items()):
        if not any(start < inner and inner_end <= end for inner, inner_end in working.items()):
            yield from instructions[start:end]


def faults(configuration: Configuration, report: Report) -> list[str]:
    """Why the report is not acceptable."""
    widths = report.widths
    found = [f"{report.spills} spills"] if report.spills else []
    if configuration.wide and widths.loads + widths.stores == 0:
        found.append("no global access found in a loop")
    if configuration.wide and (widths.wide_loads, widths.wide_stores) != (widths.loads, widths.stores):
        found.append("an access narrower than 128 bits in a loop")
    needed = report.registers * WARP * configuration.launch["num_warps"] * configuration.programs
    if needed > REGISTERS:
        found.append(f"{configuration.programs} programs of {report.registers} registers a thread do not fit")
    if configuration.tensor_cores and not report.products:
        found.append("no matrix product on the tensor cores in a loop")
    return found


def describe(configuration: Configuration) -> str:
    """Kernel, dtype and launch in one line."""
    launch = " ".join(f"{name}={value}" for name, value in configuration.launch.items() if name != "enable_fp_fusion")
    return f"{configuration.kernel.__name__:<32}{str(configuration.dtype)[6:]:<10}{launch}"


def _output(tool: str, *arguments: str) -> str:
    return subprocess.run([TOOLS / tool, *arguments], check=True, capture_output=True, text=True).stdout


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kernel", default="", help="only kernels whose name contains this")
    parser.add_argument("--arch", type=int, action="append", help="compute capability, as 90; may be repeated")
    chosen = parser.parse_args(arguments)
    if INTERPRETED:
        raise SystemExit("TRITON_INTERPRET is set: kernels decorated for the interpreter cannot be compiled")

    every = configurations()
    architectures = tuple(chosen.arch or ARCHITECTURES)
    indices = [i for i, configuration in enumerate(every) if chosen.kernel in configuration.kernel.__name__]
    started = time.perf_counter()
    failures = []
    with tempfile.TemporaryDirectory() as cache, ProcessPoolExecutor(os.cpu_count()) as pool:
        os.environ["TRITON_CACHE_DIR"] = cache
        work = {(i, arch): pool.submit(compile_one, i, arch) for i in indices for arch in architectures}
        print(
            "registers / shared bytes / spills / 128-bit loads and stores of those in loops, on "
            + _names(architectures)
        )
        for i in indices:
            reports = {arch: work[i, arch].result() for arch in architectures}
            columns = [f"{r.registers:>3} {r.shared:>6} {r.spills} {r.widths!s:<10}" for r in reports.values()]
            print(f"{describe(every[i]):<138} | " + " | ".join(columns), flush=True)
            for arch, report in reports.items():
                if report.products:
                    print(f"    sm_{arch} " + ", ".join(f"{count} {name}" for name, count in report.products.items()))
                failures += [f"{describe(every[i])} on sm_{arch}: {fault}" for fault in faults(every[i], report)]
    seconds = time.perf_counter() - started
    print(f"{len(work)} compilations in {seconds:.0f} s by triton {triton.__version__}; {len(failures)} faults")
    print("\n".join(failures), end="\n" if failures else "")
    return 1 if failures else 0


def _names(architectures: tuple[int, ...]) -> str:
    return ", ".join(f"sm_{arch}" for arch in architectures)


if __name__ == "__main__":
    sys.exit(main())
