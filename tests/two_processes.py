"""torchrun, with two processes on the CPU."""

from __future__ import annotations

import os
import subprocess
import sys

from torch import distributed


def torchrun(*words: str, **environment: str) -> str:
    """Run ``torchrun words`` to its end, which must be a success; returns what was printed."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **environment}
    done = subprocess.run([*launch, *words], env=variables, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def part() -> None:
    """What a script that torchrun runs ends with: the group's threads can abort an interpreter that just ends."""
    distributed.barrier()
    distributed.destroy_process_group()
