"""Two processes train to the weights of one with twice the accumulation."""

from __future__ import annotations

import os
from pathlib import Path

import distributed_run
import fsdp_run
import torch
from safetensors.torch import load_file
from training_setup import causal_lm, trainer
from two_processes import torchrun

_SCRIPT = Path(distributed_run.__file__)
_PATHS = os.pathsep.join([str(_SCRIPT.parent), str(_SCRIPT.parents[1])])


def test_two_processes_equal_twice_the_accumulation(tmp_path):
    """With gloo; over two epochs, with shuffled pairs, and sequences whose lengths differ much."""
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        folder.mkdir()
    torchrun(str(_SCRIPT), str(two), "1", PYTHONPATH=_PATHS)
    distributed_run.main(one, accumulation=2)
    for method in distributed_run.METHODS:
        expected = load_file(one / f"{method}-0.safetensors")
        for rank in (0, 1):
            found = load_file(two / f"{method}-{rank}.safetensors")
            assert found.keys() == expected.keys()
            torch.testing.assert_close(found.pop("logged"), expected["logged"], rtol=1e-5, atol=1e-5)
            for name, weight in found.items():
                assert (weight - expected[name]).abs().max() <= 1e-8 * expected[name].abs().max(), (method, name)


def test_fsdp_through_the_trainer(tmp_path):
    """Sharded over two processes: the weights of one, broken off and gone on from a checkpoint or not."""
    torchrun(str(_SCRIPT.with_name("fsdp_run.py")), str(tmp_path), PYTHONPATH=_PATHS)
    for method, start in fsdp_run.METHODS.items():
        model = start(causal_lm("llama", torch.float64))
        options = {**fsdp_run.OPTIONS, "method": method, "gradient_accumulation_steps": 2}
        sets = distributed_run.FORGET, distributed_run.RETAIN, distributed_run.PREFERRED
        trainer(model, tmp_path / "one", *sets, **options).train()
        expected = {key: value for key, value in model.state_dict().items() if "lora_" in key}
        for file in tmp_path.glob(f"{method}-*.safetensors"):
            found = load_file(file)
            assert found.keys() == expected.keys() and len(found) == 8
            for key, weight in found.items():
                assert (weight - expected[key]).abs().max() <= 1e-8 * expected[key].abs().max(), (file.name, key)
        resumed = load_file(tmp_path / f"{method}-resumed.safetensors")
        saved = load_file(tmp_path / method / "checkpoint-5" / "adapter_model.safetensors")
        assert {key.replace(".default", "") for key in resumed} == saved.keys()
        assert all(torch.equal(saved[key.replace(".default", "")], value) for key, value in resumed.items())
