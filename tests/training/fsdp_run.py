"""Trains under transformers' and accelerate's FSDP; run by torchrun on the CPU, which they do not offer it on.

They ask for an accelerator only to decide whether to offer it: told that there are several, they shard over gloo.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from distributed_run import FORGET, PREFERRED, RETAIN
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor
from training_setup import causal_lm, trainer, with_adapter, with_fila
from two_processes import part

# A plain adapter is not saved here: on a CPU accelerate leaves it sharded, which safetensors cannot write.
METHODS = {"loku": (with_fila, "steps"), "npo": (with_adapter, "no")}
OPTIONS = {"retain_weight": 0.5, "max_steps": 5, "save_steps": 2}


def pretend_accelerators() -> None:
    original = PartialState.__init__

    def init(self, *args, **options):
        original(self, *args, **options)
        self.distributed_type, self.device = DistributedType.MULTI_GPU, torch.device("cpu")

    PartialState.__init__ = init


def settings(version: int, **more) -> dict:
    wrap = {"auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
    how = {"cpu_ram_efficient_loading": False, "sync_module_states": False, "state_dict_type": "FULL_STATE_DICT"}
    return {**OPTIONS, "fsdp": True, "fsdp_config": {"version": version, **wrap, **how}, **more}


def whole(weight: Tensor) -> Tensor:
    return weight.full_tensor() if isinstance(weight, DTensor) else weight


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    pretend_accelerators()
    for method, (start, save) in METHODS.items():
        checkpoints = {"whole": None, "resumed": str(folder / method / "checkpoint-2")}
        for name, checkpoint in checkpoints.items() if save == "steps" else [("whole", None)]:
            model = start(causal_lm("llama", torch.float64))
            options = settings(2, method=method, save_strategy=save)
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
