"""MA and EL_n against their definitions, spelt out with model.generate and lists of n-grams."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from small_models import FAMILIES, VOCABULARY, build, token_ids
from torch import Tensor, nn
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from loku.evaluation import (
    TdecThresholds,
    evaluate_tdec,
    extraction,
    extraction_likelihood,
    memorization_accuracy,
    tdec_thresholds,
)
from loku.evaluation.extraction import common_ngrams, first_error
from loku.evaluation.greedy import GreedyReader, check_cache

_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "sliding_window": 5,
}


def any_model(family: str) -> nn.Module:
    if family in FAMILIES:
        return build(family)
    torch.manual_seed(2)
    if family == "lora_head":  # whose logits no head's weight alone gives
        adapted = LoraConfig(r=4, target_modules=["q_proj", "lm_head"], init_lora_weights=False, task_type="CAUSAL_LM")
        return get_peft_model(build("llama"), adapted).eval()
    if family == "mistral":
        return MistralForCausalLM(MistralConfig(initializer_range=0.15, **_SIZES)).eval()
    return Gemma2ForCausalLM(Gemma2Config(initializer_range=0.15, head_dim=16, **_SIZES)).eval()


def continuation(model: nn.Module, prefix: Tensor, length: int) -> Tensor:
    """Of one prefix, to the given length, without an end-of-sequence token."""
    model.generation_config.eos_token_id = None
    return model.generate(
        prefix[None], attention_mask=torch.ones_like(prefix[None]), do_sample=False,
        max_new_tokens=length - len(prefix), pad_token_id=0,
    )[0]  # fmt: skip


def partly_memorised(model: nn.Module, rows: int = 3, length: int = 20) -> Tensor:
    """The model's own continuations, of which some tokens are replaced: it errs there, and repeats itself elsewhere."""
    generator = torch.Generator().manual_seed(5)
    tokens = torch.stack([continuation(model, prefix, length) for prefix in token_ids(rows, 3)])
    replaced = torch.rand(tokens.shape, generator=generator) < 0.12
    return torch.where(replaced, torch.randint(VOCABULARY, tokens.shape, generator=generator), tokens)


def ngrams(tokens: Tensor, n: int) -> list[tuple[int, ...]]:
    return [tuple(tokens[k : k + n].tolist()) for k in range(len(tokens) - n + 1)]


def plain_extraction_likelihood(model: nn.Module, x: Tensor, sizes: list[int]) -> list[float]:
    """EL_n for each n of ``sizes``, by one generation for each prefix."""
    shares = {n: [] for n in sizes}
    for i in range(1, len(x) - min(sizes) + 1):
        generated = continuation(model, x[:i], len(x))[i:]
        for n in (n for n in sizes if i <= len(x) - n):
            of_suffix = ngrams(x[i:], n)
            shares[n].append(sum(gram in set(of_suffix) for gram in ngrams(generated, n)) / len(of_suffix))
    return [sum(shares[n]) / len(shares[n]) for n in sizes]


@pytest.mark.parametrize("family", [*FAMILIES, "mistral", "gemma2", "lora_head"])
def test_extraction_likelihood_is_the_plain_definition(family, monkeypatch):
    model, sizes = any_model(family), [1, 3, 15]  # n = T - 1 = 15: only the prefix of one token counts
    input_ids = partly_memorised(model, rows=2, length=16)
    plain = torch.tensor([plain_extraction_likelihood(model, x, sizes) for x in input_ids], dtype=torch.float64)
    for n, expected in zip(sizes[:2], plain.T, strict=False):
        assert expected.max() > 0.01 and expected.unique().numel() > 1, f"EL_{n} has nothing to tell apart"
    for batch_size, most_rows in ((32, 256), (1, 256), (1, 3)):
        monkeypatch.setattr(extraction, "_MOST_ROWS", most_rows)
        found = [extraction_likelihood(model, input_ids, n, batch_size=batch_size) for n in sizes]
        torch.testing.assert_close(torch.stack(found, dim=1), plain, rtol=0, atol=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_the_model_says_itself_is_fully_extracted(family):
    model = build(family)
    input_ids = torch.stack([continuation(model, prefix, 20) for prefix in token_ids(2, 1)])
    assert extraction_likelihood(model, input_ids, 4).tolist() == [1.0, 1.0]
    assert memorization_accuracy(model, input_ids).tolist() == [1.0, 1.0]


def test_extraction_likelihood_in_bfloat16():
    model = build("llama", torch.bfloat16)
    input_ids = torch.stack([continuation(model, prefix, 24) for prefix in token_ids(2, 1)])
    assert extraction_likelihood(model, input_ids, 3).min() > 0.5  # equal up to near ties, which rounding may decide


@pytest.mark.parametrize("family", [*FAMILIES, "gemma2", "lora_head"])
def test_memorization_accuracy_is_the_plain_definition(family):
    model = any_model(family)
    input_ids = partly_memorised(model)
    with torch.no_grad():
        hits = [
            [model(x[None, :t]).logits[0, -1].argmax() == x[t] for t in range(1, len(x))] for x in input_ids
        ]  # x_1..x_T are x[0]..x[T - 1]: t = 2..T
    expected = torch.tensor(hits, dtype=torch.float64).mean(1)
    assert expected.min() > 0 and expected.max() < 1
    for batch_size in (32, 2):
        torch.testing.assert_close(memorization_accuracy(model, input_ids, batch_size=batch_size), expected)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4), st.lists(st.lists(st.integers(0, 2), min_size=9, max_size=9), min_size=2, max_size=2))
def test_common_ngrams(n, rows):
    """Three different tokens only, so that n-grams repeat in both."""
    continued, truth = torch.tensor(rows)
    expected = [
        sum(gram in set(ngrams(truth[i:], n)) for gram in ngrams(continued[i:], n)) for i in range(len(truth) - n + 1)
    ]
    assert common_ngrams(continued[None], truth[None], n)[0].tolist() == expected


def test_the_head_is_taken_over_where_it_can_be():
    assert GreedyReader(build("gpt_neo")).from_hidden
    assert GreedyReader(any_model("gemma2")).from_hidden  # with its soft cap
    assert not GreedyReader(any_model("lora_head")).from_hidden


def test_first_error():
    input_ids = torch.tensor([[4, 5, 6, 7, 8], [4, 5, 6, 7, 8]])
    predicted = torch.tensor([[5, 0, 7, 0], [5, 6, 7, 8]])
    assert first_error(predicted, input_ids).tolist() == [[2, 2, 2, 4, 4], [5, 5, 5, 5, 5]]


@pytest.mark.parametrize("family", [*FAMILIES, "lora_head"])
def test_ties_go_to_the_lowest_token(family):
    model = any_model(family)
    with torch.no_grad():
        for parameter in model.get_output_embeddings().parameters():
            parameter.zero_()
    input_ids = torch.tensor([[0, 0, 1, 0, 5, 0, 0, 2]])  # every logit is 0, so the model always says 0
    assert memorization_accuracy(model, input_ids).tolist() == [4 / 7]
    # 0 0 is in the suffix of each prefix of 1 to 5 tokens, not in that of 6.
    assert extraction_likelihood(model, input_ids, 2).tolist() == [pytest.approx(5 / 6)]


@pytest.mark.parametrize("measure", [memorization_accuracy, extraction_likelihood])
def test_the_model_is_left_as_it_was(measure):
    model = build("gpt_neo")
    model.config.use_cache = False
    model.train()
    model.transformer.h[0].eval()
    before = {name: module.training for name, module in model.named_modules()}
    measured = measure(model, token_ids(2, 12))
    assert {name: module.training for name, module in model.named_modules()} == before
    assert not measured.requires_grad and all(parameter.grad is None for parameter in model.parameters())


def test_dropout_is_off():
    model = build("gpt_neo")
    expected = extraction_likelihood(model, partly_memorised(model), 2)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.9
    model.train()
    assert torch.equal(extraction_likelihood(model, partly_memorised(model.eval()), 2), expected)


def test_evaluate_tdec_and_thresholds():
    model = build("gpt_neo")
    seen, unseen = partly_memorised(model), token_ids(4, 20)
    metrics = evaluate_tdec(model, seen, 3)
    assert metrics == {
        "ma": memorization_accuracy(model, seen).mean().item(),
        "el_3": extraction_likelihood(model, seen, 3).mean().item(),
    }
    assert evaluate_tdec(model, seen, 3, extraction=False) == {"ma": metrics["ma"]}
    thresholds = tdec_thresholds(model, unseen, 3)
    assert thresholds == TdecThresholds(
        extraction_likelihood(model, unseen, 3).mean().item(), memorization_accuracy(model, unseen).mean().item(), 3
    )
    assert not thresholds.reached(metrics)
    assert thresholds.reached(evaluate_tdec(model, unseen, 3))


def test_both_thresholds_must_be_reached():
    thresholds = TdecThresholds(extraction_likelihood=0.05, memorization_accuracy=0.3)
    assert thresholds.reached({"el_10": 0.05, "ma": 0.3})
    assert not thresholds.reached({"el_10": 0.06, "ma": 0.1})
    assert not thresholds.reached({"el_10": 0.01, "ma": 0.31})
    assert not thresholds.reached({"ma": 0.1})  # not measured


@pytest.mark.parametrize(
    ("input_ids", "n", "said"),
    [
        (torch.zeros(2, 5), 2, "integers .* got torch.float32"),
        (torch.zeros(5, dtype=torch.int64), 2, r"\(sequences, tokens\), got .* \(5,\)"),
        ([[1, 2, 3]], 2, "got list"),
        (token_ids(2, 10), 10, "at least 11 tokens"),
        (token_ids(0, 20), 10, "must have a sequence"),
        (token_ids(1, 65), 10, "has 65 tokens a sequence, the model's context is 64"),
        (token_ids(2, 10), 0, "n and batch_size must be positive, got 0"),
    ],
)
def test_bad_input_is_refused(input_ids, n, said):
    with pytest.raises(ValueError, match=said):
        extraction_likelihood(build("gpt_neo"), input_ids, n)


def test_a_model_without_keys_and_values_is_refused_before_it_is_measured():
    config = MambaConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1, state_size=4)
    with pytest.raises(ValueError, match="keeps no"):
        check_cache(MambaForCausalLM(config))
