"""Trains under transformers' and accelerate's FSDP; run by torchrun."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from distributed_run import FORGET, PREFERRED, RETAIN
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor
from training_setup import causal_lm, trainer, with_adapter, with_fila
from two_processes import FSDP_CONFIG, part, pretend_accelerators

METHODS = {"loku": with_fila, "npo": with_adapter}
OPTIONS = {"retain_weight": 0.5, "max_steps": 5, "save_steps": 2}


def settings(version: int, **more) -> dict:
    return {**OPTIONS, "fsdp": True, "fsdp_config": {**FSDP_CONFIG, "version": version}, **more}


def whole(weight: Tensor) -> Tensor:
    return weight.full_tensor() if isinstance(weight, DTensor) else weight


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    pretend_accelerators()
    for method, start in METHODS.items():
        for name, checkpoint in {"whole": None, "resumed": str(folder / method / "checkpoint-2")}.items():
            model = start(causal_lm("llama", torch.float64))
            options = settings(2, method=method, save_strategy="steps")
            done = trainer(model, folder / method, FORGET, RETAIN, PREFERRED, **options)
            assert done.is_fsdp_enabled and done.accelerator.state.fsdp_plugin.fsdp_version == 2
            done.train(resume_from_checkpoint=checkpoint)
            state = done.model_wrapped.state_dict()
            weights = {key: whole(value) for key, value in state.items() if "lora_" in key}
            if done.is_world_process_zero():
                save_file(weights, folder / f"{method}-{name}.safetensors")
    try:
        trainer(with_fila(causal_lm("llama")), folder / "old", FORGET, RETAIN, **settings(1, method="loku"))
    except ValueError as error:
        assert "version 2" in str(error)
    else:
        raise AssertionError("FILA under FSDP 1 was not refused")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    part()
