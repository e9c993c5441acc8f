"""At step 0 the model is the base model: within a bound (residual), or exactly (shadow)."""

from __future__ import annotations

import copy

import pytest
import torch
from fila_models import FAMILIES, adapted, build, logits, original_weights, some_state, token_ids, train
from peft import LoraConfig

from loku.fila import FilaConfig, initialize_lora_fila_weights
from loku.fila.targets import base_weight, lora_layers

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def started(base, mode="residual", residual_dtype=None, **options):
    model = adapted(base, **options)
    config = FilaConfig(mode=mode, residual_dtype=residual_dtype)
    initialize_lora_fila_weights(model, some_state(model), config=config, show_progress_bar=False)
    return model


def trained_in_float64(family, mode):
    base = build(family, torch.float64)
    model = started(base, mode)
    train(model)
    return base, model


def assert_logits(model, expected):
    """Of a model in float64."""
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", [*FAMILIES, "gpt2"])
def test_residual_weights(family, dtype):
    """|W' + s B A - W| <= u |W'| + 4 u32 (|W| + s |B| |A|), elementwise: one rounding to the weight's dtype, whose unit
    roundoff is u, of a result that is right in float32 (u32; in float64 for float64 weights)."""
    base = build(family, dtype)
    model, weights = started(base), original_weights(base)
    unit = torch.finfo(dtype).eps / 2
    wide = torch.finfo(torch.promote_types(dtype, torch.float32)).eps / 2
    for name, layer in lora_layers(model, "default").items():
        A, B = layer.lora_A["default"].weight.double(), layer.lora_B["default"].weight.double()
        s, residual = layer.scaling["default"], base_weight(layer)
        assert residual.dtype == dtype
        residual = residual.double()
        tiny = torch.finfo(dtype).smallest_normal * unit
        bound = unit * residual.abs() + 4 * wide * (weights[name].abs() + s * B.abs() @ A.abs()) + tiny
        assert bool(((residual + s * B @ A - weights[name]).abs() <= bound).all()), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", [*FAMILIES, "gpt2"])
def test_residual_logits(family, dtype):
    """The logits are within 3 times the base model's own error in the same dtype, measured against float64."""
    base = build(family, dtype)
    exact = logits(copy.deepcopy(base).double()) if dtype != torch.float64 else logits(base)
    own = (logits(base).double() - exact).norm() if dtype != torch.float64 else 1e-12 * exact.norm()
    assert (logits(started(base)).double() - exact).norm() <= 3 * own


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", [*FAMILIES, "gpt2"])
def test_with_the_residual_adapter_off_the_model_is_the_base(family, dtype):
    """To the same bound as at step 0, after training, and again after merging."""
    base = build(family, dtype)
    model = started(base)
    train(model)
    trained = logits(model)
    exact = logits(copy.deepcopy(base).double()) if dtype != torch.float64 else logits(base)
    own = (logits(base).double() - exact).norm() if dtype != torch.float64 else 1e-12 * exact.norm()
    with model.disable_adapter():
        assert (logits(model).double() - exact).norm() <= 3 * own
    assert torch.equal(logits(model), trained)
    if dtype == torch.float64:
        model.merge_adapter()
        with model.disable_adapter():
            assert_logits(model, exact)


def beside_another(base):
    """A trained residual with a second trained adapter, on some of its modules, that is active; and it on the base."""
    model = started(base)
    train(model)
    other = adapted(base, target_modules=["q_proj"])
    train(other)
    model.add_adapter("other", LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj"]))
    for name, layer in lora_layers(other, "default").items():
        for x in ("lora_A", "lora_B"):
            weight = getattr(layer, x)["default"].weight
            getattr(model.get_base_model().get_submodule(name), x)["other"].weight.data.copy_(weight)
    model.set_adapter("other")
    return model.eval(), other


def test_other_adapters_beside_a_residual_act_on_the_base():
    """Live, merged, and merged into what is left after unloading; and nothing merged leaves the base."""
    base = build("llama", torch.float64)
    model, other = beside_another(base)
    expected = logits(other)
    assert_logits(model, expected)
    for unloaded, right in [
        (copy.deepcopy(model).merge_and_unload(), expected),
        (copy.deepcopy(model).merge_and_unload(safe_merge=True), expected),
        (copy.deepcopy(model).unload(), logits(base)),
    ]:
        assert_logits(unloaded, right)
    model.merge_adapter()
    assert_logits(model, expected)
    assert_logits(model.merge_and_unload(), expected)


def test_a_mixed_batch_over_a_residual():
    """Each row is what its adapter makes of it, and the model goes on as before."""
    base = build("llama", torch.float64)
    model, other = beside_another(base)
    rows = {"other": logits(other)[0], "__base__": logits(base)[1]}
    model.set_adapter("default")
    alone = logits(model)
    mixed = model(token_ids(), adapter_names=["other", "__base__", "default"]).logits
    torch.testing.assert_close(mixed, torch.stack([*rows.values(), alone[2]]), rtol=0, atol=1e-10)
    with model.disable_adapter():
        off = model(token_ids(), adapter_names=["other", "__base__", "default"]).logits
    torch.testing.assert_close(off, logits(base), rtol=0, atol=1e-10)
    assert torch.equal(logits(model), alone)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("mode", ["residual", "shadow"])
def test_a_scaled_adapter_is_so_much_of_what_was_trained(family, mode):
    """W + c s (B A - B0 A0) after PEFT's scale_layer(c): live, off, merged, in a mixed batch, and unloaded."""
    base, model = trained_in_float64(family, mode)
    expected = copy.deepcopy(base)
    for name, layer in lora_layers(model, "default").items():
        a, b = layer.lora_A["default"], layer.lora_B["default"]
        change = 0.5 * layer.scaling["default"] * (b.weight @ a.weight - b.initial @ a.initial)
        weight = expected.get_submodule(name).weight
        weight.data += change.T if family == "gpt2" else change
        layer.scale_layer(0.5)
    assert_logits(model, logits(expected))
    with model.disable_adapter():
        assert_logits(model, logits(base))
    if mode == "residual":
        mixed = model(token_ids(), adapter_names=["default", "__base__", "default"]).logits
        rows = torch.stack([logits(expected)[0], logits(base)[1], logits(expected)[2]])
        torch.testing.assert_close(mixed, rows, rtol=0, atol=1e-10)
    assert_logits(copy.deepcopy(model).merge_and_unload(), logits(expected))
    assert_logits(copy.deepcopy(model).unload(), logits(base))
    model.merge_adapter()
    assert_logits(model, logits(expected))
    for layer in lora_layers(model, "default").values():
        layer.scale_layer(2)
    assert_logits(model, logits(expected))  # what is merged stays as it was
    for layer in lora_layers(model, "default").values():
        layer.unscale_layer(2)
    with model.disable_adapter():
        assert_logits(model, logits(base))


def test_a_residual_without_its_adapter_is_refused():
    model = started(build("llama"))
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"]))
    model.delete_adapter("default")
    for use in (lambda: logits(model), model.unload, model.merge_and_unload):
        with pytest.raises(RuntimeError, match="the FILA adapter 'default' was deleted, which leaves its residual"):
            use()
    state = {name: torch.ones(layer.out_features) for name, layer in lora_layers(model, "other").items()}
    with pytest.raises(ValueError, match=r"q_proj is the residual that the adapter 'default' left behind"):
        initialize_lora_fila_weights(model, state, adapter_name="other", show_progress_bar=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["phi", "gpt2"])
def test_residual_in_float32_under_a_16_bit_model(family, dtype):
    """Nothing is rounded: W' + s B A is W to float32 accuracy, and the model still computes in its own dtype."""
    base = build(family, dtype)
    model, weights = started(base, residual_dtype=torch.float32), original_weights(base)
    for name, layer in lora_layers(model, "default").items():
        A, B = layer.lora_A["default"].weight.double(), layer.lora_B["default"].weight.double()
        restored = base_weight(layer).double() + layer.scaling["default"] * B @ A
        assert base_weight(layer).dtype == torch.float32
        torch.testing.assert_close(restored, weights[name], rtol=0, atol=1e-6 * float(weights[name].abs().max()))
    exact = logits(copy.deepcopy(base).double())
    out = logits(model)
    assert out.dtype == dtype
    assert (out.double() - exact).norm() <= 1.5 * (logits(base).double() - exact).norm()
    train(model, steps=1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", [*FAMILIES, "gpt2"])
def test_shadow_is_exact(family, dtype):
    """Bit for bit, at step 0; and after training with the adapter disabled."""
    base = build(family, dtype)
    model = started(base, "shadow")
    assert torch.equal(logits(model), logits(base))
    train(model, steps=2)
    assert not torch.equal(logits(model), logits(base))
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(base))
    for name, weight in original_weights(base).items():
        assert torch.equal(base_weight(lora_layers(model, "default")[name]).double(), weight), name


def test_shadow_under_autocast():
    base = build("llama")
    model = started(base, "shadow")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(logits(model), logits(base))


@pytest.mark.parametrize("family", [*FAMILIES, "gpt2"])
def test_both_modes_train_alike(family):
    base = build(family, torch.float64)
    residual, shadow = started(base), started(base, "shadow")
    for model in (residual, shadow):
        train(model)
    torch.testing.assert_close(logits(residual), logits(shadow), rtol=0, atol=1e-9)


def test_gradient_checkpointing_changes_nothing():
    base = build("llama", torch.float64)
    plain, checkpointed = started(base, "shadow"), started(base, "shadow")
    checkpointed.enable_input_require_grads()
    checkpointed.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for model in (plain, checkpointed):
        model.train()
        model(token_ids(), labels=token_ids()).loss.backward()
    gradients = dict(checkpointed.named_parameters())
    trained = [(name, p.grad) for name, p in plain.named_parameters() if p.requires_grad]
    assert trained and all(torch.equal(gradients[name].grad, grad) for name, grad in trained)
    assert sum(bool(grad.any()) for _, grad in trained) == len(trained)  # A and B both, from the first step on


@pytest.mark.parametrize("mode", ["residual", "shadow"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_merging_and_unmerging(family, mode):
    _, model = trained_in_float64(family, mode)
    before = logits(model)
    for safe in (False, True):
        model.merge_adapter(safe_merge=safe)
        assert_logits(model, before)
        model.unmerge_adapter()
        assert_logits(model, before)
    assert_logits(model.merge_and_unload(), before)


def test_a_second_adapter_stays_itself_beside_a_shadow():
    base = build("llama", torch.float64)
    model = started(base, "shadow")
    model.add_adapter("other", copy.copy(adapted(base).peft_config["default"]))
    model.set_adapter("other")
    assert torch.equal(logits(model), logits(base))
    mixed = model(token_ids(2), adapter_names=["default", "other"]).logits
    torch.testing.assert_close(mixed, base(token_ids(2)).logits, rtol=0, atol=1e-12)
    model.delete_adapter("default")
    assert torch.equal(logits(model), logits(base))
