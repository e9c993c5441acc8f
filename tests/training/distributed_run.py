"""Trains with each method and saves the weights; run by torchrun, or as one process with more accumulation."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from training_setup import causal_lm, sequences, trained_weights, trainer, with_adapter, with_fila
from two_processes import part

METHODS = {"loku": with_fila, "npo": with_adapter, "dpo": with_adapter}
# Lengths so uneven that a mean of the processes' means would be far off.
FORGET = [*sequences(4, 1), *sequences(4, 4, 40, 60)]
RETAIN = [*sequences(4, 2), *sequences(7, 5, 40, 60)]
PREFERRED = sequences(8, 3)


def main(folder: Path, accumulation: int) -> None:
    torch.set_num_threads(1)
    rank, count = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    for method, start in METHODS.items():
        model = start(causal_lm("llama", torch.float64))
        search = method == "dpo"  # for unused parameters, from the outputs: they must have the logits then
        options = {"retain_weight": 0.5, "max_steps": 5, "gradient_accumulation_steps": accumulation}
        options = {**options, "method": method, "ddp_find_unused_parameters": search}
        done = trainer(model, folder / "run", FORGET, RETAIN, PREFERRED, **options)
        assert done.args.world_size == count and done.scorer.refusal is None
        done.train()
        assert (done.scorer.refusal is not None) == (search and count > 1)
        logged = [[e["loss"], e["forget_loss"], e["retain_loss"]] for e in done.state.log_history if "loss" in e]
        save_file(
            {**trained_weights(done.model), "logged": torch.tensor(logged)}, folder / f"{method}-{rank}.safetensors"
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
    part()
