from __future__ import annotations

import math

import pytest
import torch
from small_models import FAMILIES, build, token_ids
from torch.nn.functional import cross_entropy

from loku.evaluation import perplexity, sequence_losses


def examples_of_many_lengths() -> list[dict[str, list[int]]]:
    tokens = token_ids(5, 20).tolist()
    examples = [
        {"input_ids": row[:length], "labels": row[:length]}
        for row, length in zip(tokens, (3, 20, 7, 7, 12), strict=True)
    ]
    examples[1]["labels"] = [-100] * 11 + tokens[1][11:]  # a prompt
    return examples


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("max_tokens", [None, 24, 1])
def test_sequence_losses_are_those_of_each_sequence_alone(family, max_tokens):
    model = build(family)
    examples = examples_of_many_lengths()
    losses = sequence_losses(model, examples, max_tokens=max_tokens)
    model.double()
    for i, example in enumerate(examples):
        with torch.no_grad():
            logits = model(torch.tensor([example["input_ids"]])).logits[0, :-1]
        labels = torch.tensor(example["labels"][1:])
        torch.testing.assert_close(losses.total[i], cross_entropy(logits, labels, reduction="sum"), rtol=2e-6, atol=0)
        assert losses.tokens[i] == (labels != -100).sum()
    torch.testing.assert_close(losses.mean, losses.total / losses.tokens)


def test_perplexity_weighs_tokens_not_sequences():
    model = build("llama")
    examples = examples_of_many_lengths()
    losses = sequence_losses(model, examples)
    expected = math.exp(losses.total.sum() / losses.tokens.sum())
    assert perplexity(model, examples) == pytest.approx(expected, rel=1e-12)
    assert expected != pytest.approx(math.exp(losses.mean.mean()), rel=1e-3)


def test_perplexity_of_blocks():
    model, blocks = build("gpt_neo").double(), token_ids(4, 16)
    with torch.no_grad():
        logits = model(blocks).logits[:, :-1].flatten(0, 1)
    assert perplexity(model, blocks) == pytest.approx(cross_entropy(logits, blocks[:, 1:].flatten()).exp().item())


def test_perplexity_refuses_what_cannot_be_scored():
    model = build("gpt_neo")
    with pytest.raises(ValueError, match="examples must not be empty"):
        perplexity(model, [])
    with pytest.raises(ValueError, match="65 tokens, more than the model's context of 64"):
        perplexity(model, token_ids(1, 65))
    with pytest.raises(ValueError, match="no token to score"):
        perplexity(model, token_ids(2, 1))
