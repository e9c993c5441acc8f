"""TOFU's sequences and models of GPT-2's vocabulary, for the benchmarks of whole passes."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import GPT2Tokenizer, GPTNeoConfig, GPTNeoForCausalLM

from loku.data import IGNORE_INDEX, Example, LanguageModelCollator, load_records, tokenise

DATA = Path(os.environ.get("LOKU_DATA", Path(__file__).parents[2] / "shared" / "data"))
VOCABULARY = 50257
# Tokens of prompts and of answers with the end-of-sequence token, of forget10 by the GPT-2 tokenizer: mean, spread.
PROMPT_TOKENS, ANSWER_TOKENS = (18.5, 5.0), (37.1, 12.8)
_FILL = {"input_ids": 0, "attention_mask": 0, "labels": IGNORE_INDEX}


def examples(split: str, count: int) -> tuple[str, list[Example]]:
    """The first of a split where the data are at hand ("TOFU's"); else "drawn", with lengths like those."""
    if (DATA / "tofu" / f"{split}.json").exists() and (DATA / "gpt2_tokenizer").exists():
        tokenizer = GPT2Tokenizer.from_pretrained(DATA / "gpt2_tokenizer")
        return "TOFU's", tokenise(load_records(f"{split}[0:{count}]", DATA), tokenizer, "plain")
    generator = torch.Generator().manual_seed(0)
    draws = [mean + spread * torch.randn(count, generator=generator) for mean, spread in (PROMPT_TOKENS, ANSWER_TOKENS)]
    drawn = []
    for prompt, answer in zip(*(draw.round().int().clamp(min=4).tolist() for draw in draws), strict=True):
        ids = torch.randint(VOCABULARY, (prompt + answer,), generator=generator).tolist()
        drawn.append(Example(input_ids=ids, labels=[IGNORE_INDEX] * prompt + ids[prompt:]))
    return "drawn", drawn


def padded(batch: list[Example], length: int) -> dict[str, Tensor]:
    """A row for each sequence, all of ``length``, which none may exceed."""
    return {
        name: pad(x, (0, length - x.shape[1]), value=_FILL[name]) for name, x in LanguageModelCollator(0)(batch).items()
    }


def gpt_neo(layers: int, size: int) -> GPTNeoForCausalLM:
    """Of random weights, with heads of 64."""
    config = GPTNeoConfig(
        num_layers=layers,
        hidden_size=size,
        num_heads=size // 64,
        vocab_size=VOCABULARY,
        attention_types=[[["global", "local"], layers // 2]],
    )
    torch.manual_seed(0)
    return GPTNeoForCausalLM(config).train()  # no dropout, by its configuration
