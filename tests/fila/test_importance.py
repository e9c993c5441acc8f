"""Row weights from data, against an explicit loop over sequences in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from fila_models import FAMILIES, adapted, build, logits, token_ids, train
from fisher_oracle import explicit_fisher, groups_of, matrices_alive, padded, sequences
from peft import LoraConfig

from loku.fila import (
    FilaConfig,
    get_fila_state_dict,
    initialize_lora_fila_weights,
    load_fila_adapter,
    save_fila_adapter,
)
from loku.fila.targets import base_weight, lora_layers


def exact_fisher(base, rows: list[torch.Tensor], names: list[str]) -> dict[str, torch.Tensor]:
    """In float64, (out, in) also for Conv1D."""
    fisher = explicit_fisher(copy.deepcopy(base).double(), groups_of(rows, 1), names)
    return {name: f.T if type(base.get_submodule(name)).__name__ == "Conv1D" else f for name, f in fisher.items()}


@pytest.mark.parametrize("family", [*FAMILIES, "gpt2"])
@pytest.mark.parametrize("eps_mode", ["absolute", "relative"])
def test_row_weights_from_data(family, eps_mode):
    base = build(family)
    model = adapted(base, lora_dropout=0.2).train()
    forget, retain = sequences(0), sequences(1, 7)
    config = FilaConfig(eps_mode=eps_mode)
    state = get_fila_state_dict(model, padded(forget, 2), padded(retain, 3), config, show_progress_bar=False)
    names = list(lora_layers(model, "default"))
    assert list(state) == names
    f, r = exact_fisher(base, forget, names), exact_fisher(base, retain, names)
    for name in names:
        eps = 1e-5 * (r[name].mean() if eps_mode == "relative" else 1)
        expected = (f[name] / (eps + r[name])).sum(1).sqrt()
        torch.testing.assert_close(
            state[name].double(), expected, rtol=2e-4, atol=1e-6 * float(expected.max()), msg=name
        )
    assert model.training and all(layer.training for layer in lora_layers(model, "default").values())
    assert all(p.grad is None for p in model.parameters())
    assert [p.requires_grad for p in model.parameters()] == ["lora_" in name for name, _ in model.named_parameters()]


def test_adapters_that_are_not_trained_stay_so():
    model = adapted(build("llama"))
    model.add_adapter("second", model.peft_config["default"])
    model.base_model.set_adapter(["default", "second"])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".second." in name)
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    batches = padded(sequences(0), 2)
    get_fila_state_dict(model, batches, batches, adapter_name="second", show_progress_bar=False)
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before


def test_a_plain_model_groups_and_batch_sizes_give_the_same():
    base = build("llama")
    model = adapted(base, target_modules=["q_proj", "up_proj"])
    forget, retain = sequences(0), sequences(1)
    whole = get_fila_state_dict(model, padded(forget, 5), padded(retain, 5), show_progress_bar=False)
    peft_config = LoraConfig(target_modules=["q_proj", "up_proj"])
    largest = 2 * 8 * 48 * 32
    for settings in ({"memory_budget": largest}, {"memory_budget": 2 * largest}, {}):
        state = get_fila_state_dict(
            base,
            padded(forget, 2),
            padded(retain, 1),
            FilaConfig(**settings),
            peft_config=peft_config,
            show_progress_bar=False,
        )
        assert state.fingerprints == whole.fingerprints
        assert state.keys() == whole.keys() and len(state) == 4
        for name in state:
            torch.testing.assert_close(state[name], whole[name], rtol=1e-4, atol=0)


def test_importance_is_of_the_base_whatever_its_adapters_say():
    """Another active adapter of a model, or this one, may have been trained before."""
    base = build("llama")
    model = adapted(base, target_modules=["q_proj", "up_proj"])
    data = padded(sequences(0), 5), padded(sequences(1), 5)
    expected = get_fila_state_dict(model, *data, show_progress_bar=False)
    train(model, rate=0.2)
    trained = logits(model)
    assert (trained - logits(base)).abs().max() > 0.1
    state = get_fila_state_dict(model, *data, show_progress_bar=False)
    assert state.keys() == expected.keys() and all(torch.equal(state[name], expected[name]) for name in expected)
    assert torch.equal(logits(model), trained)


@pytest.mark.parametrize("modules", [1, 2])
def test_groups_of_modules_stay_within_the_memory_budget(modules, monkeypatch):
    """Both data sets' Fisher matrices of a group are gone when those of the next are made."""
    alive = matrices_alive(monkeypatch)
    data = padded(sequences(0), 5)
    config = FilaConfig(memory_budget=2 * modules * 4 * 48 * 32)
    model = adapted(build("llama"), target_modules=["up_proj", "gate_proj"])
    get_fila_state_dict(model, data, data, config, show_progress_bar=False)
    assert len(alive) == 2 * 4 and max(alive) <= config.memory_budget


@pytest.mark.parametrize("mode", ["residual", "shadow"])
def test_from_data_to_a_saved_adapter(tmp_path, mode, capsys):
    """The few lines of the package's docstring, with progress bars."""
    base = build("gpt_neo", torch.bfloat16)
    model = adapted(base)
    data = {"forget_dataloader": padded(sequences(0), 2), "retain_dataloader": padded(sequences(1), 2)}
    initialize_lora_fila_weights(model, **data, config=FilaConfig(mode=mode))
    bars = capsys.readouterr().err
    assert all(text in bars for text in ("forget importance", "retain importance", "weighted SVD", "module/s", "GiB"))
    exact = logits(copy.deepcopy(base).double())
    assert (logits(model).double() - exact).norm() <= 3 * (logits(base).double() - exact).norm()
    model(token_ids(), labels=token_ids()).loss.backward()
    save_fila_adapter(model, tmp_path)
    assert torch.equal(logits(load_fila_adapter(copy.deepcopy(base), tmp_path).eval()), logits(model))


def test_what_is_refused():
    base = build("llama")
    model = adapted(base)
    good = padded(sequences(0), 2)
    with pytest.raises(ValueError, match=r"batches of retain_dataloader must have labels, got \['input_ids'\]"):
        get_fila_state_dict(model, good, [{"input_ids": token_ids()}], show_progress_bar=False)
    with pytest.raises(ValueError, match="forget_dataloader has no batches"):
        get_fila_state_dict(model, [], good, show_progress_bar=False)
    ignored = [{**batch, "labels": torch.full_like(batch["labels"], -100)} for batch in good]
    for which, data in (("forget", (ignored, good)), ("retain", (good, ignored))):
        with pytest.raises(ValueError, match=f"all labels in the batches of {which}_dataloader are ignored"):
            get_fila_state_dict(model, *data, show_progress_bar=False)
    with pytest.raises(ValueError, match="model must be a PeftModel, or peft_config must name its target_modules"):
        get_fila_state_dict(base, good, good, show_progress_bar=False)
    with pytest.raises(ValueError, match=r"no linear layer of the model matches target_modules = \{'wq'\}"):
        get_fila_state_dict(base, good, good, peft_config=LoraConfig(target_modules=["wq"]), show_progress_bar=False)
    small = FilaConfig(memory_budget=2 * 4 * 61 * 32)
    with pytest.raises(ValueError, match=r"forget_dataloader is an iterator, .* takes \d+ passes"):
        get_fila_state_dict(model, iter(good), good, small, show_progress_bar=False)


def test_data_that_never_reach_a_module():
    """A zero retain Fisher is refused by the module's name, and the model is left as it was."""
    base = build("llama")
    with torch.no_grad():
        base.model.layers[1].mlp.down_proj.weight.zero_()  # no gradient comes through to up_proj
    model = adapted(base)
    good = padded(sequences(0), 2)
    with (
        pytest.warns(UserWarning, match="no gradient reached"),
        pytest.raises(ValueError, match=r"forget Fisher of model\.layers\.1\.mlp\.\w+ is zero everywhere"),
    ):
        initialize_lora_fila_weights(model, forget_dataloader=good, retain_dataloader=good, show_progress_bar=False)
    for name, layer in lora_layers(model, "default").items():
        assert torch.equal(base_weight(layer), base.get_submodule(name).weight)
