"""Small models of each family, built from their configurations."""

from __future__ import annotations

import torch
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


def token_ids(rows: int = 3, length: int = 20) -> Tensor:
    return torch.randint(VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(3))
