"""`torchrun -m loku`: two processes, one run folder."""

from __future__ import annotations

import torch
import torch.distributed as distributed
from cli_setup import logged, results
from safetensors.torch import load_file
from two_processes import torchrun


def test_torchrun_without_an_accelerator_makes_one_run_of_its_processes(workshop, loku, tmp_path, no_plots):
    """Nothing on the command line says that it is a CPU: by themselves, the processes would not know of each other."""
    two, one = tmp_path / "two", tmp_path / "one"
    words = [str(word) for word in workshop.unlearn("loku", two) if word != "--use_cpu"]
    assert torchrun("-m", "loku", *words).count("Before") == 1  # one table
    loku(*workshop.unlearn("loku", one, "--gradient_accumulation_steps", 2))
    assert [line["step"] for line in logged(two)] == [line["step"] for line in logged(one)]
    assert results(two)["steps"] == results(one)["steps"]
    found, expected = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (two, one))
    assert found.keys() == expected.keys()
    for name, weight in found.items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-3, atol=1e-4 * float(weight.abs().max()))


def test_importance_is_shared_between_processes(workshop, loku, tmp_path):
    two, one = tmp_path / "two", tmp_path / "one"
    words = ["importance", "--model", workshop / "llama", *workshop.texts, "--fisher_batch_tokens", 48]
    printed = torchrun("-m", "loku", *map(str, words), "--output_dir", str(two))
    assert printed.count("written to") == 1
    loku(*words, "--output_dir", one)
    found, expected = (load_file(folder / "importance.safetensors") for folder in (two, one))
    assert found.keys() == expected.keys()
    for name, weights in found.items():
        torch.testing.assert_close(weights, expected[name], rtol=1e-4, atol=0.0)


def test_a_program_keeps_the_process_group_that_it_made(workshop, loku, tmp_path):
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        loku("importance", "--model", workshop / "llama", *workshop.texts, "--output_dir", tmp_path / "rows")
        assert distributed.is_initialized()
    finally:
        distributed.destroy_process_group()
