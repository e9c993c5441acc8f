"""Adapters on small models of each family."""

from __future__ import annotations

import copy

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from small_models import FAMILIES, VOCABULARY, build, token_ids
from torch import Tensor, nn
from transformers import GPT2LMHeadModel

from loku.fila import FilaStateDict
from loku.fila.targets import base_weight, lora_layers

__all__ = [
    "FAMILIES",
    "VOCABULARY",
    "adapted",
    "build",
    "logits",
    "original_weights",
    "some_state",
    "token_ids",
    "train",
]


def adapted(base: nn.Module, adapter_name: str = "default", **options) -> PeftModel:
    """A new LoRA adapter on a copy of the model."""
    settings = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **options}
    settings["fan_in_fan_out"] = isinstance(base, GPT2LMHeadModel)
    return get_peft_model(copy.deepcopy(base), LoraConfig(**settings), adapter_name=adapter_name).eval()


def some_state(model: PeftModel, adapter_name: str = "default") -> FilaStateDict:
    """Row weights over four decades, with one exact zero in each module."""
    generator = torch.Generator().manual_seed(2)
    state = FilaStateDict()
    for name, layer in lora_layers(model, adapter_name).items():
        state[name] = 10 ** (4 * torch.rand(layer.out_features, generator=generator) - 4)
        state[name][3] = 0
    return state


def original_weights(base: nn.Module) -> dict[str, Tensor]:
    """Module name -> (out, in), in float64, of a model's linear layers."""
    model = adapted(base)
    return {name: base_weight(layer).double() for name, layer in lora_layers(model, "default").items()}


def train(model: nn.Module, steps: int = 3, rate: float = 0.02) -> None:
    """A few optimiser steps, large enough to move the logits."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    for _ in range(steps):
        model(token_ids(), labels=token_ids()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(token_ids()).logits
