"""Small models of each family, and adapters on them."""

from __future__ import annotations

import copy

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
)

from loku.fila import FilaStateDict
from loku.fila.targets import base_weight, lora_layers

VOCABULARY = 61
FAMILIES = ["gpt_neo", "phi", "llama"]
_SIZES = {"hidden_size": 32, "intermediate_size": 48, "vocab_size": VOCABULARY, "max_position_embeddings": 64}


def build(family: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The same weights each time, large enough for logits that differ."""
    torch.manual_seed(1)
    wide = {"initializer_range": 0.15, "bos_token_id": 0, "eos_token_id": 0}
    if family == "gpt_neo":
        config = GPTNeoConfig(
            num_layers=2, num_heads=2, attention_types=[[["global", "local"], 1]], window_size=8, **_SIZES, **wide
        )
        model = GPTNeoForCausalLM(config)
    elif family == "phi":
        model = PhiForCausalLM(PhiConfig(num_hidden_layers=2, num_attention_heads=2, **_SIZES, **wide))
    elif family == "llama":
        heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
        model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, **heads, **_SIZES, **wide))
    else:  # the one with Conv1D
        model = GPT2LMHeadModel(
            GPT2Config(n_layer=2, n_head=2, n_embd=32, n_positions=64, vocab_size=VOCABULARY, **wide)
        )
    return model.to(dtype).eval()


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


def token_ids(rows: int = 3, length: int = 20) -> Tensor:
    return torch.randint(VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(3))


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
