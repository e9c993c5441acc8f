"""What FILA cannot be applied to is refused by name, and the model is left as it was."""

from __future__ import annotations

import copy
import sys
import types

import pytest
import torch
from fila_models import adapted, build, logits, some_state, train
from peft import LoraConfig, PeftModel
from torch import nn

from loku.fila import FilaConfig, FilaStateDict, initialize_lora_fila_weights, save_fila_adapter
from loku.fila.fingerprint import fingerprint, same_weight


def start(model, state=None, **options):
    name = options.pop("adapter_name", "default")
    state = some_state(model, name) if state is None else state
    initialize_lora_fila_weights(model, state, config=FilaConfig(**options), adapter_name=name, show_progress_bar=False)


@pytest.mark.parametrize(
    "options,message",
    [
        ({"use_dora": True}, "plain LoRA, but .*q_proj uses DoraLinearVariant"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "but model.embed_tokens is adapted by PEFT's Embedding"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights in .*, got 'pissa'"),
        ({"init_lora_weights": "olora"}, "init_lora_weights in .*, got 'olora'"),
        ({"layer_replication": [(0, 2), (0, 2)]}, "defined for the layers of the base, but .* has layer_replication"),
        ({"rank_pattern": {"k_proj": 17}}, r"k_proj must be at most min\(out, in\) = 16, got 17"),
    ],
)
@pytest.mark.parametrize("mode", ["residual", "shadow"])
def test_adapters(options, message, mode):
    model = adapted(build("llama"), **options)
    with pytest.raises(ValueError, match=message):
        start(model, FilaStateDict(), mode=mode)


def test_adapters_that_are_in_use():
    base = build("llama")
    model = adapted(base)
    start(model)
    with pytest.raises(ValueError, match="FILA was already applied to the adapter 'default'"):
        start(model)
    model = adapted(base)
    train(model)
    with pytest.raises(ValueError, match=r"was trained or loaded before: lora_B of .* is not zero"):
        start(model)
    model = adapted(base)
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"q_proj is merged with \['default'\]"):
        start(model)
    with pytest.raises(ValueError, match=r"adapter_name must be one of \['default'\], got 'other'"):
        start(adapted(base), FilaStateDict(), adapter_name="other")
    with pytest.raises(TypeError, match="model must be a PeftModel, got LlamaForCausalLM"):
        start(base, FilaStateDict())
    with pytest.raises(ValueError, match="fila_state_dict is required, or forget_dataloader"):
        initialize_lora_fila_weights(adapted(base), forget_dataloader=[])


def test_the_base_is_not_changed_under_another_adapter():
    base = build("llama")
    model = adapted(base)
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"change the base under the adapters \['other'\]; use mode='shadow'"):
        start(model)
    start(model, mode="shadow")
    assert torch.equal(logits(model), logits(base))


def test_a_tied_weight_is_not_changed():
    base = build("gpt2")
    model = adapted(base, target_modules=["c_fc", "lm_head"])
    with pytest.raises(ValueError, match=r"the weight of lm_head is tied to another module's"):
        start(model)
    start(model, mode="shadow")
    assert torch.equal(logits(model), logits(base))


def test_row_weights_that_do_not_fit():
    base = build("llama")
    name = "model.layers.1.mlp.up_proj"
    for change, message in [
        (lambda s: s.pop(name), rf"no row weights for {name} \(1 of 14 modules\)"),
        (lambda s: s.update({name: torch.ones(7)}), rf"\['{name}'\] must have the shape \(48,\), got \(7,\)"),
        (lambda s: s[name].fill_(float("nan")), rf"{name}: row_weight must be finite"),
        (lambda s: s[name].zero_(), rf"{name}: row_weight is 0 throughout"),
        (lambda s: s.fingerprints.update({name: "0" * 16}), rf"belongs to another base model: .* {name} \(1 of"),
    ]:
        model = adapted(base)
        state = some_state(model)
        change(state)
        before = {key: value.clone() for key, value in model.state_dict().items()}
        with pytest.raises(ValueError, match=message):
            start(model, state)
        after = model.state_dict()
        assert after.keys() == before.keys() and all(torch.equal(after[key], before[key]) for key in before)


def test_a_rank_that_the_weighted_matrix_does_not_have():
    """Two rows with weight carry two directions; the others start at zero, which is said."""
    base = build("llama", torch.float64)
    model = adapted(base, target_modules=["up_proj"])
    state = some_state(model)
    state["model.layers.0.mlp.up_proj"][2:] = 0
    with pytest.warns(UserWarning, match=r"layers\.0\.mlp\.up_proj \(1 modules\) has a lower rank"):
        start(model, state)
    torch.testing.assert_close(logits(model), logits(base), rtol=0, atol=1e-10)
    layer = model.get_base_model().model.layers[0].mlp.up_proj
    assert not layer.lora_A["default"].weight[2:].any() and not layer.base_layer.weight[:2].abs().max() > 1e-12


@pytest.mark.parametrize("mode", ["residual", "shadow"])
def test_combining_is_left_to_what_was_saved(tmp_path, mode):
    """PEFT would combine the trained factors without the initial ones."""
    base = build("llama")
    model = adapted(base)
    start(model, mode=mode)
    train(model)
    before = logits(model)
    with pytest.raises(ValueError, match="cannot be combined with others in a live model"):
        model.add_weighted_adapter(["default"], [1.0], "weighted")
    assert list(model.peft_config) == ["default"] and torch.equal(logits(model), before)
    save_fila_adapter(model, tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    loaded.add_weighted_adapter(["default"], [1.0], "weighted")
    loaded.set_adapter("weighted")
    torch.testing.assert_close(logits(loaded), before, rtol=0, atol=1e-5)


class Params4bit(nn.Parameter):
    """Stands for bitsandbytes' class of this name, by which PEFT knows it: 8-bit integers and a scale."""

    def __new__(cls, data, scale):
        self = torch.Tensor._make_subclass(cls, data, False)
        self.quant_state = scale
        return self

    def __deepcopy__(self, memo):
        return Params4bit(self.data.clone(), self.quant_state)


class FourBitLinear(nn.Linear):
    def __init__(self, linear: nn.Linear):
        super().__init__(linear.in_features, linear.out_features, bias=False)
        scale = linear.weight.detach().abs().max() / 127
        self.weight = Params4bit((linear.weight.detach() / scale).round().to(torch.int8), scale)

    def forward(self, x):
        return nn.functional.linear(x, self.weight.data.to(x.dtype) * self.weight.quant_state)


class Int8Params(nn.Parameter):
    """Likewise for 8 bits: the layer's ``state`` has the largest entry of each row."""

    def __new__(cls, data):
        return torch.Tensor._make_subclass(cls, data, False)

    def __deepcopy__(self, memo):
        return Int8Params(self.data.clone())


class EightBitLinear(nn.Linear):
    def __init__(self, linear: nn.Linear):
        super().__init__(linear.in_features, linear.out_features, bias=False)
        self.state = types.SimpleNamespace(SCB=linear.weight.detach().abs().amax(1))
        self.weight = Int8Params((127 * linear.weight.detach() / self.state.SCB[:, None]).round().to(torch.int8))

    def forward(self, x):
        return nn.functional.linear(x, dequantised_rows(self.weight.data, self.state.SCB).to(x.dtype))


def dequantised_rows(data, largest):
    return data.float() * (largest / 127)[:, None]


@pytest.mark.parametrize("linear", [FourBitLinear, EightBitLinear])
def test_quantised_bases_are_served_by_the_shadow_mode_alone(linear, monkeypatch):
    base = build("llama")
    for layer in base.model.layers:
        layer.mlp.up_proj = linear(layer.mlp.up_proj)
    model = adapted(base, target_modules=["up_proj", "q_proj"])
    stub = types.ModuleType("bitsandbytes")
    stub.functional = types.SimpleNamespace(
        dequantize_4bit=lambda data, scale: data.float() * scale, int8_vectorwise_dequant=dequantised_rows
    )
    monkeypatch.setitem(sys.modules, "bitsandbytes", stub)
    with pytest.raises(
        ValueError, match=r"quantised weight of .*up_proj \((Params4bit|Int8Params)\).*use mode='shadow'"
    ):
        start(model)
    state = some_state(model)
    start(model, state, mode="shadow")
    assert torch.equal(logits(model), logits(base))
    quantised = base.model.layers[0].mlp.up_proj
    weight = quantised(torch.eye(quantised.in_features)).T
    A = model.get_base_model().model.layers[0].mlp.up_proj.lora_A["default"].weight
    scaled = state["model.layers.0.mlp.up_proj"][:, None] * weight
    V = torch.linalg.svd(scaled.double(), full_matrices=False)[2][:4]
    projected = A.double() @ V.T @ V
    torch.testing.assert_close(projected, A.double(), rtol=0, atol=1e-4 * float(A.abs().max()))
    train(model)


def test_fingerprints_tell_models_apart_and_dtypes_not():
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert fingerprint(weight) == fingerprint(weight.float()) == fingerprint(weight.double())
    assert not same_weight(fingerprint(weight), fingerprint(weight.T))
    assert not same_weight(fingerprint(weight), fingerprint(weight * 1.01))
    changed = weight.float()
    changed[:, 100] += 1  # one column of 256: samples visit them all
    assert not same_weight(fingerprint(changed), fingerprint(weight))


@pytest.mark.parametrize("made", [torch.float32, torch.bfloat16, torch.float16])
def test_a_copy_in_another_dtype_is_the_same_weight(made):
    """Whichever was made from which; and as fine-tuned by a thousandth, it is another in any of them."""
    weight = 0.02 * torch.randn(256, 512, generator=torch.Generator().manual_seed(0))
    tuned = weight * (1 + 1e-3 * torch.randn(256, 512, generator=torch.Generator().manual_seed(1)))
    for other in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        own = fingerprint(weight.to(made))
        assert same_weight(own, fingerprint(weight.to(made).to(other)))
        assert same_weight(fingerprint(weight.to(made).to(other)), own)
        assert not same_weight(own, fingerprint(tuned.to(made).to(other)))
        assert not same_weight(own, fingerprint(tuned.to(other)))
