"""`torchrun -m loku`: two processes, one run folder."""

from __future__ import annotations

import os
import subprocess
import sys

import torch
from cli_setup import logged, results
from safetensors.torch import load_file

LAUNCH = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "loku")


def test_torchrun_without_an_accelerator_makes_one_run_of_its_processes(workshop, loku, tmp_path, no_plots):
    """Nothing on the command line says that it is a CPU: by themselves, the processes would not know of each other."""
    two, one = tmp_path / "two", tmp_path / "one"
    words = [str(word) for word in workshop.unlearn("loku", two) if word != "--use_cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([*LAUNCH, *words], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("Before") == 1  # one table
    loku(*workshop.unlearn("loku", one, "--gradient_accumulation_steps", 2))
    assert [line["step"] for line in logged(two)] == [line["step"] for line in logged(one)]
    assert results(two)["steps"] == results(one)["steps"]
    found, expected = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (two, one))
    assert found.keys() == expected.keys()
    for name, weight in found.items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-3, atol=1e-4 * float(weight.abs().max()))
