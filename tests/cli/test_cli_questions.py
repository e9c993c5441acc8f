"""Which records of one's own files are measured as questions, and how long their answers may become."""

from __future__ import annotations

import json

import pytest
import torch
from cli_setup import results, write_lines
from transformers import AutoConfig, AutoTokenizer, LlamaForCausalLM

LONG = [
    {"question": "Who? " * 120, "answer": "Ada of the lighthouse."},
    {"question": "Who keeps it?", "answer": "Ada keeps it, as did her mother. " * 12},
]


@pytest.fixture
def long_model(workshop, tmp_path):
    """A Llama with a context of 1024 tokens."""
    tokenizer = AutoTokenizer.from_pretrained(workshop / "llama")
    config = AutoConfig.from_pretrained(workshop / "llama", max_position_embeddings=1024)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "long")
    tokenizer.save_pretrained(tmp_path / "long")
    return tmp_path / "long"


@pytest.fixture
def answers_by_heart(workshop, monkeypatch):
    """Whatever the weights, a Llama generates the answers of `LONG`, as far as it is let."""
    tokenizer = AutoTokenizer.from_pretrained(workshop / "llama")

    def generate(self, input_ids, attention_mask, generation_config):
        room = generation_config.max_new_tokens
        rows = []
        for prompt in tokenizer.batch_decode(input_ids, skip_special_tokens=True):
            (answer,) = [record["answer"] for record in LONG if record["question"] in prompt]
            rows.append((tokenizer(answer).input_ids + [tokenizer.eos_token_id] * room)[:room])
        return torch.cat([input_ids, torch.tensor(rows)], dim=1)

    monkeypatch.setattr(LlamaForCausalLM, "generate", generate)


def test_long_questions_and_long_answers(workshop, loku, folder, tmp_path, long_model, answers_by_heart, no_plots):
    """More than the 200 tokens that TOFU gives a question with its answer; what is known by heart has ROUGE 1."""
    words = ["--forget", write_lines(tmp_path / "long.jsonl", LONG), "--max_length", "900"]
    loku(*workshop.unlearn("ihl", folder, "--model", long_model, *words))
    assert results(folder)["before"]["forget_rouge"] == 1.0


@pytest.mark.parametrize("other", [{"text": "Ada keeps the lighthouse."}, {"input_ids": [5, 6, 7, 8]}])
@pytest.mark.parametrize("first", ["question", "other"])
def test_questions_among_other_records(workshop, loku, folder, tmp_path, no_plots, first, other):
    """Only they have answers to measure."""
    question = json.loads((workshop / "forget.jsonl").read_text().splitlines()[0])
    records = [question, other] if first == "question" else [other, question]
    path = write_lines(tmp_path / "mixed.jsonl", records)
    loku(*workshop.unlearn("ihl", folder, "--forget", path, "--per_device_train_batch_size", "1"))
    found = results(folder)
    assert 0 <= found["before"]["forget_rouge"] <= 1 and "retain_rouge" not in found["before"]
