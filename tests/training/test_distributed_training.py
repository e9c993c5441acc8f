"""Two processes train to the weights of one with twice the accumulation."""

from __future__ import annotations

import os
from pathlib import Path

import distributed_run
import torch
from safetensors.torch import load_file
from two_processes import torchrun

_SCRIPT = Path(distributed_run.__file__)


def test_two_processes_equal_twice_the_accumulation(tmp_path):
    """With gloo; over two epochs, with shuffled pairs, and sequences whose lengths differ much."""
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        folder.mkdir()
    paths = os.pathsep.join([str(_SCRIPT.parent), str(_SCRIPT.parents[1])])
    torchrun(str(_SCRIPT), str(two), "1", PYTHONPATH=paths)
    distributed_run.main(one, accumulation=2)
    for method in distributed_run.METHODS:
        expected = load_file(one / f"{method}-0.safetensors")
        for rank in (0, 1):
            found = load_file(two / f"{method}-{rank}.safetensors")
            assert found.keys() == expected.keys()
            torch.testing.assert_close(found.pop("logged"), expected["logged"], rtol=1e-5, atol=1e-5)
            for name, weight in found.items():
                assert (weight - expected[name]).abs().max() <= 1e-8 * expected[name].abs().max(), (method, name)
