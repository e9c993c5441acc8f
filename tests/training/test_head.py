"""Hidden states and head stand for the model's own logits, or the model's logits are used; never something else."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from training_setup import batch_of, causal_lm, scored_logits, sequences, with_adapter
from transformers import LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast

from loku.data import Role
from loku.training import Scorer
from loku.training.scores import HiddenScores, LogitScores, kl_divergence
from loku_kernels import gemm

POOLS = {Role.FORGET: sequences(4, 1), Role.RETAIN: sequences(5, 2)}
TRANSFORMS = {"gemma2": (1.0, 0.7), "cohere": (0.3, None), "granite": (1 / 3, None)}
FAMILIES = ["gpt_neo", "phi", "llama", "llama_tied", *TRANSFORMS]


def weighted_loss(scores):
    """Every row's IHL and CE, with weights that tell the rows apart."""
    weights = torch.linspace(0.5, 2, len(scores.targets), dtype=scores.dtype)
    return scores.unlearning_loss(weights, 2 - weights)[0] + (weights * scores.log_probabilities()).sum()


def value_and_gradients(model, scores):
    loss = weighted_loss(scores)
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return loss.detach(), found


def both(model, batch):
    """Of the model's own logits, and of hidden states."""
    scorer = Scorer(model)
    assert scorer.refusal is None
    hidden = scorer(model, batch)
    scorer.refusal = "for comparison"
    logits = scorer(model, batch)
    assert isinstance(hidden, HiddenScores) and isinstance(logits, LogitScores)
    return value_and_gradients(model, logits), value_and_gradients(model, hidden)


def assert_equal(expected, found, relative=1e-9):
    torch.testing.assert_close(found[0], expected[0], rtol=relative, atol=0)
    assert found[1].keys() == expected[1].keys() and found[1]
    for name, gradient in expected[1].items():
        error = (found[1][name] - gradient).abs().max()
        assert error <= relative * gradient.abs().max(), name


@pytest.mark.parametrize("row_tokens", [None, 30])
@pytest.mark.parametrize("family", FAMILIES)
def test_both_paths_give_the_models_own_loss(family, row_tokens):
    """Gradients of all parameters, the head's and tied embeddings' included; log p of each sequence alone."""
    model = causal_lm(family, torch.float64)
    head = model.get_output_embeddings()
    if head.bias is not None:
        nn.init.normal_(head.bias)
    batch = batch_of(POOLS, row_tokens)
    logits, hidden = both(model, batch)
    assert_equal(logits, hidden)
    if "lm_head.weight" not in hidden[1]:
        assert model.config.tie_word_embeddings
    scores = Scorer(model)(model, batch)
    scale, softcap = TRANSFORMS.get(family, (1.0, None))
    assert scores.head.scale == pytest.approx(scale, rel=1e-12)
    assert scores.head.softcap == (softcap and pytest.approx(softcap, rel=1e-12))
    forget = scores.log_probabilities()[scores.row_roles == Role.FORGET]
    order = scores.row_sequences[scores.row_roles == Role.FORGET].argsort(stable=True)
    alone = [scored_logits(model, example) for example in POOLS[Role.FORGET]]
    expected = [logits.log_softmax(-1).gather(1, targets[:, None])[:, 0] for logits, targets in alone]
    rounding = 1e-6 if family in ("gpt_neo", "gemma2") else 1e-9  # the softmax of their attention is in float32 always
    torch.testing.assert_close(forget[order], torch.cat(expected), rtol=rounding, atol=rounding)
    assert "forward" not in vars(head)


@pytest.mark.parametrize("family", ["llama", "phi", "llama_tied", "gemma2"])
def test_modules_to_save_head(family):
    """The trained copy with the adapter on, the original with it off."""
    base = causal_lm(family, torch.float64)
    model = with_adapter(base, modules_to_save=["lm_head"])
    copy_of_head = model.get_base_model().lm_head.modules_to_save["default"]
    copy_of_head.weight.data += 0.1 * torch.randn_like(copy_of_head.weight)
    batch = batch_of(POOLS)
    logits, hidden = both(model, batch)
    assert_equal(logits, hidden)
    assert any("modules_to_save" in name for name in hidden[1])
    scorer = Scorer(model)
    with torch.no_grad():
        with model.disable_adapter():
            off = scorer(model, batch).log_probabilities()
        torch.testing.assert_close(off, Scorer(base)(base, batch).log_probabilities(), rtol=1e-12, atol=0)
        assert (off - scorer(model, batch).log_probabilities()).abs().max() > 0.1


def test_lora_on_the_head_is_computed_by_the_model():
    model = with_adapter(causal_lm("llama", torch.float64), target_modules=["q_proj", "lm_head"])
    scorer = Scorer(model)
    assert scorer.refusal == "the head is Linear, not a plain nn.Linear"  # PEFT's
    found = value_and_gradients(model, scorer(model, batch_of(POOLS)))
    merged = copy.deepcopy(model).merge_and_unload()
    expected = weighted_loss(Scorer(merged)(merged, batch_of(POOLS))).detach()
    torch.testing.assert_close(found[0], expected, rtol=1e-9, atol=0)
    assert any("lm_head.lora_A" in name for name in found[1])


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    model = with_adapter(causal_lm("llama", torch.float64)).train()
    batch = batch_of(POOLS)
    _, plain = both(model, batch)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    assert_equal(plain, both(model, batch)[1], relative=1e-12)


@pytest.mark.parametrize("family", ["llama", "phi", "gemma2"])
@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16(family, autocast):
    """Nearer to float64 than, or as near as, the model's own logits in bfloat16 are."""
    model, batch = causal_lm(family, torch.bfloat16), batch_of(POOLS)
    exact = copy.deepcopy(model).double()
    truth = Scorer(exact)(exact, batch).log_probabilities().detach()
    if autocast:
        model = model.float()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), torch.no_grad():
        scorer = Scorer(model)
        scores = scorer(model, batch)
        scorer.refusal = "for comparison"
        own = scorer(model, batch)
    # The loss is taken outside of the autocast, as in a trainer, in the dtype that the head ran in.
    assert isinstance(scores, HiddenScores) and scores.head.autocast == (torch.bfloat16 if autocast else None)
    error, theirs = ((each.log_probabilities().double() - truth).norm() for each in (scores, own))
    assert 0 < error <= 1.1 * theirs and error <= 0.02 * truth.norm()


def test_prompt_and_padding_never_reach_the_head(monkeypatch):
    model = with_adapter(causal_lm("llama"))
    scorer, batch = Scorer(model, chunk_bytes=16 * 61 * 4), batch_of(POOLS)
    rows, product = [], gemm.linear

    def counted(hidden, weight, *others):
        if len(weight) == 61:  # forms logits; the gradient's product goes the other way
            rows.append(len(hidden))
        return product(hidden, weight, *others)

    monkeypatch.setattr(gemm, "linear", counted)
    monkeypatch.setattr(nn.Linear, "forward", _no_vocabulary(nn.Linear.forward))
    scored = len(batch["rows"])
    assert scored < batch["attention_mask"].sum() < batch["input_ids"].numel()
    scores = scorer(model, batch)
    scores.unlearning_loss(torch.ones(scored), torch.ones(scored))[0].backward()
    assert sum(rows) == scored and len(rows) > 1
    rows.clear()
    retain = scores.of(Role.RETAIN)
    retain.log_probabilities()
    assert sum(rows) == len(retain.targets) < scored


def _no_vocabulary(forward):
    def checked(module, hidden):
        assert module.out_features != 61, "the head ran"
        return forward(module, hidden)

    return checked


class _Biased(LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        found = super().forward(*args, **kwargs)
        return CausalLMOutputWithPast(logits=self.changed(found.logits))


CHANGES = {
    "a bias": lambda logits: logits + 0.5,
    "a clamp": lambda logits: logits.clamp(-1, 1),
    "log-softmax": lambda logits: logits.log_softmax(-1),
    "positions": lambda logits: logits * torch.arange(1, logits.shape[1] + 1, dtype=logits.dtype)[:, None],
    "one token": lambda logits: torch.cat([logits[..., :1] + 1, logits[..., 1:]], -1),
    "the vocabulary": lambda logits: logits + torch.zeros(61, dtype=logits.dtype),
    "rounding": lambda logits: logits.bfloat16(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_other_changes_of_the_logits_are_left_to_the_model(change):
    model = _Biased(causal_lm("llama").config).double()
    model.changed = CHANGES[change]
    scorer = Scorer(model)
    assert scorer.refusal
    scores = scorer(model, batch_of(POOLS))
    assert isinstance(scores, LogitScores) and "forward" not in vars(model.lm_head)


def test_heads_that_are_not_taken_over():
    model = causal_lm("llama")
    model.lm_head.register_forward_hook(lambda *_: None)
    assert Scorer(model).refusal == "the head's forward is hooked"
    compiled = causal_lm("llama")
    compiled.compile(backend="eager")
    assert Scorer(compiled).refusal == "the model is compiled"
    sharded = causal_lm("llama")
    sharded.lm_head.weight.ds_id = 1
    assert Scorer(sharded).refusal == "the head's weight is sharded"
    flat = causal_lm("llama")
    scorer = Scorer(flat)
    assert scorer.refusal is None
    whole = flat.lm_head.weight
    flat.lm_head.weight = nn.Parameter(whole.detach().flatten()[:7])  # as FSDP leaves it outside of forward
    with pytest.raises(RuntimeError):
        scorer(flat, batch_of(POOLS))
    assert scorer.refusal == "the head's weight is sharded"
    flat.lm_head.weight = whole
    assert isinstance(scorer(flat, batch_of(POOLS)), LogitScores)


def test_deepspeeds_engine_is_looked_into():
    class Engine(nn.Module):  # as DeepSpeedEngine is made
        def __init__(self, module):
            super().__init__()
            self.module = module

        def zero_optimization_stage(self):
            return 2

        def forward(self, *inputs, **named):
            return self.module(*inputs, **named)

    model, batch = causal_lm("llama"), batch_of(POOLS)
    scorer = Scorer(model)
    scores, expected = scorer(Engine(model), batch), scorer(model, batch)
    assert isinstance(scores, HiddenScores) and scorer.refusal is None
    assert torch.equal(scores.log_probabilities(), expected.log_probabilities())
    model.lm_head.weight.ds_id = 1  # stage 3
    assert isinstance(scorer(Engine(model), batch), LogitScores) and "sharded" in scorer.refusal


def test_the_head_comes_back_when_the_model_fails():
    model = causal_lm("llama")
    scorer, batch = Scorer(model), batch_of(POOLS)
    with pytest.raises(IndexError):
        scorer(model, {**batch, "input_ids": batch["input_ids"] + 1000})
    assert "forward" not in vars(model.lm_head) and scorer.refusal is None


def test_divergence_in_chunks_equals_that_of_all_rows():
    """Value and gradient, hidden states and logits, a trained head included."""
    model, other = causal_lm("gemma2", torch.float64), causal_lm("llama", torch.float64)
    batch = batch_of(POOLS)
    scorer = Scorer(model, chunk_bytes=5 * 61 * 4)
    with torch.no_grad():
        reference = Scorer(other)(other, batch)
    log_p = scorer(model, batch).logits(slice(None)).log_softmax(-1)
    log_ref = reference.logits(slice(None)).log_softmax(-1)
    expected = (log_ref.exp() * (log_ref - log_p)).sum()
    expected.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    for refusal in (None, "for this test"):
        scorer.refusal = refusal
        model.zero_grad()
        found = kl_divergence(reference, scorer(model, batch))
        found.backward()
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)
        for name, p in model.named_parameters():
            torch.testing.assert_close(p.grad, gradients[name], rtol=1e-8, atol=1e-10)
