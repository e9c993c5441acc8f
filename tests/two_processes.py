"""torchrun, with two processes on the CPU."""

from __future__ import annotations

import os
import subprocess
import sys

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from torch import distributed

FSDP_CONFIG = {
    "version": 2,
    "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
    "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
    "cpu_ram_efficient_loading": False,
    "sync_module_states": False,
    "state_dict_type": "FULL_STATE_DICT",
}


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


def pretend_accelerators() -> None:
    """Lets transformers and accelerate offer FSDP on CPUs, over gloo: that there are accelerators is all they ask."""
    original = PartialState.__init__

    def init(self, *args, **options):
        is_first = not self.initialized
        original(self, *args, **options)
        if is_first:
            self.distributed_type, self.device = DistributedType.MULTI_GPU, torch.device("cpu")

    PartialState.__init__ = init
