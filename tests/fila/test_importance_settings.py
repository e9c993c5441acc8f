"""What FilaConfig says of the importance pass is what is done; what it leaves behind; and what it refuses by name."""

from __future__ import annotations

import copy

import pytest
import torch
from fila_models import FAMILIES, adapted, build, logits
from fisher_oracle import accumulate, packed, padded, sequences

from loku.fila import (
    FilaConfig,
    FilaStateDict,
    get_fila_state_dict,
    importance,
    initialize_lora_fila_weights,
    row_weights,
)
from loku.fila import factors as fila_factors
from loku.fila.targets import base_weight, lora_layers

FORGET, RETAIN = sequences(0), sequences(1, 7)


@pytest.mark.parametrize("granularity", ["sequence", "token", "batch"])
def test_granularity_and_eps(granularity):
    base = build("llama")
    model = adapted(base, target_modules=["q_proj", "down_proj"])
    data = padded(FORGET, 2), padded(RETAIN, 3)
    config = FilaConfig(granularity=granularity, eps=3e-4)
    state = get_fila_state_dict(model, *data, config, show_progress_bar=False)
    forget, retain = (accumulate(base, batches, granularity, target_modules=list(state)) for batches in data)
    assert len(state) == 4
    for name in state:
        expected = row_weights(forget[name], retain[name], 3e-4)
        torch.testing.assert_close(state[name], expected, rtol=1e-5, atol=0)
    assert state.importance == {"eps": 3e-4, "eps_mode": "absolute", "granularity": granularity}


@pytest.mark.parametrize("family", [*FAMILIES, "gpt2"])
def test_packed_batches_give_what_padded_ones_give(family):
    model = adapted(build(family))
    expected = get_fila_state_dict(model, padded(FORGET, 2), padded(RETAIN, 3), show_progress_bar=False)
    found = get_fila_state_dict(model, packed(FORGET, 5), packed(RETAIN, 4), show_progress_bar=False)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-6 * float(expected[name].max()))


def test_logits_of_scored_tokens_only(monkeypatch):
    """And of all tokens where the head must be seen at work: as a target, or hooked."""
    counts = []
    original = importance.fused_linear_cross_entropy

    def recorded(*arguments, rows, **options):
        counts.append(len(rows))
        return original(*arguments, rows=rows, **options)

    monkeypatch.setattr(importance, "fused_linear_cross_entropy", recorded)
    base, data = build("llama"), (padded(FORGET, 2), packed(RETAIN, 4))
    scored = [int((batch["labels"] >= 0).sum()) for batches in data for batch in batches]
    inner = get_fila_state_dict(adapted(base, target_modules=["q_proj"]), *data, show_progress_bar=False)
    assert counts == scored
    model = adapted(base, target_modules=["q_proj", "lm_head"])
    outer = get_fila_state_dict(model, *data, show_progress_bar=False)
    assert counts == scored and outer.keys() - inner.keys() == {"lm_head"}
    forget, retain = (accumulate(base, batches, target_modules=list(outer)) for batches in data)
    for name in outer:
        expected = row_weights(forget[name], retain[name], 1e-5)
        torch.testing.assert_close(outer[name], expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("mode", ["residual", "shadow"])
def test_a_cached_state_starts_the_same_adapter_as_the_data(tmp_path, mode):
    base = build("phi")
    forget, retain = padded(FORGET, 2), padded(RETAIN, 3)
    from_data, from_file = adapted(base), adapted(base)
    options = {"config": FilaConfig(mode=mode), "show_progress_bar": False}
    initialize_lora_fila_weights(from_data, forget_dataloader=forget, retain_dataloader=retain, **options)
    get_fila_state_dict(from_file, forget, retain, options["config"], show_progress_bar=False).save(tmp_path / "state")
    initialize_lora_fila_weights(from_file, FilaStateDict.load(tmp_path / "state"), **options)
    assert torch.equal(logits(from_file), logits(from_data))
    for (name, p), q in zip(from_data.named_parameters(), from_file.parameters(), strict=True):
        assert torch.equal(p, q), name


def test_the_tolerance_is_that_of_the_weighted_svd(monkeypatch):
    asked = []
    original = fila_factors.weighted_svd

    def recorded(*arguments, **options):
        asked.append(options["rtol"])
        return original(*arguments, **options)

    monkeypatch.setattr(fila_factors, "weighted_svd", recorded)
    model = adapted(build("llama"), target_modules=["q_proj"])
    data = {"forget_dataloader": padded(FORGET, 2), "retain_dataloader": padded(RETAIN, 3)}
    initialize_lora_fila_weights(model, **data, config=FilaConfig(rtol=1e-7), show_progress_bar=False)
    assert asked == [1e-7] * 2


def test_gradients_that_are_not_finite_are_refused_by_the_name_of_their_module():
    """And the model is left as it was, dropout and requires_grad included."""
    base = build("llama")
    with torch.no_grad():
        base.model.layers[1].mlp.up_proj.weight[3, 4] = float("nan")
    model = adapted(base, target_modules=["down_proj"], lora_dropout=0.1).train()
    data = padded(FORGET, 2)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(FloatingPointError, match=r"NaN or infinite .*model\.layers\.1\.mlp\.down_proj"):
        initialize_lora_fila_weights(model, forget_dataloader=data, retain_dataloader=data, show_progress_bar=False)
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items() if "up_proj" not in name)
    assert [p.requires_grad for p in model.parameters()] == ["lora_" in name for name, _ in model.named_parameters()]
    assert all(module.training for module in model.modules())
    for name, layer in lora_layers(model, "default").items():
        assert torch.equal(base_weight(layer), base.get_submodule(name).weight)
