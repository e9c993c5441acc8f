"""On a GPU the factors of several layers are found at a time, also where nothing was computed before."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import torch
from peft import LoraConfig, get_peft_model
from loku.fila import initialize_lora_fila_weights
from loku.fila.targets import lora_layers

base = torch.nn.Sequential(*(torch.nn.Linear(512, 640) if i % 2 == 0 else torch.nn.Linear(640, 512) for i in range(8)))
model = get_peft_model(base.cuda(), LoraConfig(r=8, lora_alpha=16, target_modules=[str(i) for i in range(8)]))
state = {name: torch.rand(layer.out_features) + 0.5 for name, layer in lora_layers(model, "default").items()}
x = torch.randn(4, 512, device="cuda")
before = base(x)
initialize_lora_fila_weights(model, state, show_progress_bar=False)
torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-4)
"""


@pytest.mark.gpu
def test_the_first_linear_algebra_of_a_process():
    result = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
