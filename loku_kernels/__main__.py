"""``python -m loku_kernels``: what was found on this machine, and why anything is missing."""

from __future__ import annotations

import importlib.metadata
import platform

import torch

from loku_kernels import __version__, backends


def report() -> str:
    """Versions, devices and backends, one a line."""
    lines = [
        f"loku_kernels {__version__}",
        f"python       {platform.python_version()} on {platform.system()} {platform.machine()}",
        f"torch        {torch.__version__}",
        f"triton       {_version('triton')}",
        f"CPU          {torch.get_num_threads()} threads, torch uses {torch.backends.cpu.get_cpu_capability()}",
    ]
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        lines.append(
            f"cuda:{index}       {device.name}, sm_{device.major}{device.minor}, {device.total_memory / 2**30:.0f} GiB"
        )
    if not torch.cuda.is_available():
        lines.append("cuda         torch sees no CUDA device")
    lines.append("backends")
    for name, reason in backends.available().items():
        lines.append(f"  {name:<15}{'available' if reason is None else f'missing: {reason}'}")
    return "\n".join(lines)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    print(report())
