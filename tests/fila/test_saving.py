"""What is saved loads on the unmodified base model; training goes on from it; another base is refused."""

from __future__ import annotations

import copy
import json
import subprocess
import sys

import pytest
import torch
from datasets import Dataset
from fila_models import FAMILIES, adapted, build, logits, some_state, token_ids, train
from huggingface_hub.errors import EntryNotFoundError
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

from loku.fila import FilaConfig, initialize_lora_fila_weights, load_fila_adapter, save_fila_adapter, save_merged
from loku.fila.saving import check_fila_base
from loku.fila.targets import lora_layers


def trained(base, mode="residual", adapter_name="default", **options):
    model = adapted(base, adapter_name, **options)
    state = some_state(model, adapter_name)
    initialize_lora_fila_weights(
        model, state, config=FilaConfig(mode=mode), adapter_name=adapter_name, show_progress_bar=False
    )
    train(model)
    assert (logits(model) - logits(base)).abs().max() > 0.1
    return model


_FRESH = """
import sys, torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
for folder in sys.argv[1:]:
    expected = load_file(folder + "/expected.safetensors")
    base = AutoModelForCausalLM.from_pretrained(folder + "/base")
    model = PeftModel.from_pretrained(base, folder + "/adapter").eval()
    with torch.no_grad():
        logits = model(expected["ids"]).logits
        torch.testing.assert_close(logits, expected["logits"], rtol=0, atol=1e-5)
        base = model.unload()(expected["ids"]).logits
    torch.testing.assert_close(base, expected["base"], rtol=0, atol=0)
    print("reproduced")
"""


def test_round_trip_through_a_fresh_process(tmp_path):
    """With nothing but transformers and PEFT, for each family and mode, on the unmodified base model."""
    folders = []
    for family in FAMILIES:
        for mode in ("residual", "shadow"):
            folder = tmp_path / family / mode
            base = build(family)
            model = trained(base, mode, use_rslora=mode == "shadow", rank_pattern={"k_proj|fc_in|up_proj": 2})
            base.save_pretrained(folder / "base")
            save_fila_adapter(model, folder / "adapter")
            tensors = {"ids": token_ids(), "logits": logits(model), "base": logits(base)}
            save_file(tensors, folder / "expected.safetensors")
            folders.append(str(folder))
    done = subprocess.run([sys.executable, "-c", _FRESH, *folders], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("reproduced") == 6


@pytest.mark.parametrize("mode", ["residual", "shadow"])
@pytest.mark.parametrize(
    "family,options",
    [
        ("gpt2", {}),
        ("llama", {"use_rslora": True, "alpha_pattern": {"k_proj": 5, "v_proj": 9}, "rank_pattern": {"k_proj": 3}}),
        ("phi", {"lora_bias": True, "lora_dropout": 0.1}),
        ("llama", {"adapter_name": "unlearn"}),
        ("llama", {"modules_to_save": ["lm_head"], "target_modules": ["q_proj", "up_proj"]}),
        ("llama", {"target_modules": ["q_proj", "lm_head"]}),
        ("phi", {"target_modules": r".*(q_proj|lm_head)"}),
    ],
)
def test_round_trip(tmp_path, family, options, mode):
    """By plain PEFT, by `load_fila_adapter` bit for bit, and merged."""
    base = build(family)
    name = options.get("adapter_name", "default")
    model = trained(base, mode, **options)
    expected = logits(model)
    save_fila_adapter(model, tmp_path / "adapter", name)
    files = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert files - {"README.md"} == {"adapter_model.safetensors", "adapter_config.json", "fila.json"}
    assert {path.name for path in tmp_path.iterdir()} == {"adapter"}
    plain = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(plain), expected, rtol=0, atol=1e-5)
    again = load_fila_adapter(copy.deepcopy(base), tmp_path / "adapter", adapter_name=name).eval()
    assert torch.equal(logits(again), expected)
    save_merged(again, tmp_path / "merged", name)
    assert torch.equal(logits(again), expected)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_round_trip_in_16_bits(tmp_path, dtype):
    """The reloaded model is as near the float64 value of what it stores as the live one is."""
    base = build("llama", dtype)
    model = trained(base, "residual")
    save_fila_adapter(model, tmp_path)
    exact = logits(PeftModel.from_pretrained(copy.deepcopy(base).double(), tmp_path).double())
    plain = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    error = (logits(plain).double() - exact).norm()
    assert error <= 2 * (logits(base).double() - logits(copy.deepcopy(base).double())).norm()
    assert torch.equal(logits(load_fila_adapter(copy.deepcopy(base), tmp_path).eval()), logits(model))


def test_merging_a_residual_kept_in_float32(tmp_path):
    base = build("gpt2", torch.bfloat16)
    model = adapted(base)
    config = FilaConfig(residual_dtype=torch.float32)
    initialize_lora_fila_weights(model, some_state(model), config=config, show_progress_bar=False)
    save_fila_adapter(model, tmp_path / "adapter")
    save_merged(model, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.bfloat16)
    assert all(torch.equal(p, q) for p, q in zip(base.parameters(), merged.parameters(), strict=True))
    again = load_fila_adapter(copy.deepcopy(base), tmp_path / "adapter").eval()
    assert torch.equal(logits(again), logits(model))


def test_training_goes_on_where_it_stopped(tmp_path):
    base = build("phi", torch.float64)
    model = trained(base)
    save_fila_adapter(model, tmp_path)
    again = load_fila_adapter(copy.deepcopy(base), tmp_path).eval()
    shadow = load_fila_adapter(copy.deepcopy(base), tmp_path, config=FilaConfig(mode="shadow")).eval()
    for each in (model, again, shadow):
        train(each)
    assert torch.equal(logits(again), logits(model))
    torch.testing.assert_close(logits(shadow), logits(model), rtol=0, atol=1e-9)


def test_an_adapted_head_is_stored_without_its_residual(tmp_path):
    """PEFT stores a head's base weight with the adapter, from which the unmodified base is not to be overwritten, nor
    a residual where training goes on from a shadow."""
    base = build("llama")
    models = {mode: trained(base, mode, target_modules=["q_proj", "lm_head"]) for mode in ("residual", "shadow")}
    for mode, model in models.items():
        model.save_pretrained(tmp_path / mode, save_embedding_layers=True)
        plain = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / mode).eval()
        torch.testing.assert_close(logits(plain), logits(model), rtol=0, atol=1e-5)
        assert torch.equal(plain.unload().lm_head.weight, base.lm_head.weight)
        for other in models:
            again = load_fila_adapter(copy.deepcopy(base), tmp_path / mode, config=FilaConfig(mode=other)).eval()
            torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=1e-5)
    residual = models["residual"]
    assert "base_model.model.lm_head.base_layer.weight" not in residual.state_dict()
    before = {name: p.clone() for name, p in residual.named_parameters()}
    residual.load_state_dict(residual.state_dict())
    assert all(torch.equal(p, before[name]) for name, p in residual.named_parameters())


def test_saving_twice_replaces_and_keeps_other_files(tmp_path):
    base = build("llama")
    model = trained(base)
    save_fila_adapter(model, tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    train(model, steps=1)
    save_fila_adapter(model, tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    plain = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    torch.testing.assert_close(logits(plain), logits(model), rtol=0, atol=1e-5)


class _StopAt(TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **_):
        control.should_training_stop = state.global_step >= self.step


def _trainer(base, folder, *callbacks, **options):
    model = adapted(base, **options)
    initialize_lora_fila_weights(model, some_state(model), show_progress_bar=False)
    ids = token_ids(16).tolist()
    data = Dataset.from_list([{"input_ids": row, "labels": row} for row in ids])
    arguments = TrainingArguments(
        folder, max_steps=4, save_steps=2, per_device_train_batch_size=2, learning_rate=0.02, report_to=[], seed=0,
        disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    return Trainer(model, arguments, train_dataset=data, callbacks=list(callbacks))


@pytest.mark.parametrize("targets", ["all-linear", ["up_proj", "lm_head"]])
def test_a_trainer_resumes_and_its_checkpoints_load_on_the_base(tmp_path, targets):
    base = build("llama")
    whole = _trainer(base, tmp_path / "whole", target_modules=targets)
    whole.train()
    _trainer(base, tmp_path / "parts", _StopAt(2), target_modules=targets).train()
    resumed = _trainer(base, tmp_path / "parts", target_modules=targets)
    resumed.train(resume_from_checkpoint=True)
    for (name, p), q in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(p, q), name
    checkpoint = tmp_path / "whole" / "checkpoint-4"
    expected = logits(whole.model.eval())
    plain = PeftModel.from_pretrained(copy.deepcopy(base), checkpoint).eval()
    torch.testing.assert_close(logits(plain), expected, rtol=0, atol=1e-5)
    assert torch.equal(logits(load_fila_adapter(copy.deepcopy(base), checkpoint).eval()), expected)


def test_another_base_is_refused(tmp_path):
    base = build("llama")
    model = trained(base)
    save_fila_adapter(model, tmp_path)
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.mul_(1 + 0.02 * torch.randn_like(parameter))
    residual = copy.deepcopy(base)
    for name, layer in lora_layers(model, "default").items():
        residual.get_submodule(name).weight.data.copy_(layer.get_base_layer().weight)
    for other in (tuned, residual):
        before = {name: p.clone() for name, p in other.named_parameters()}
        with pytest.raises(
            ValueError, match=r"belongs to another base model: the weights of model\.layers\.0\.self_attn"
        ):
            load_fila_adapter(other, tmp_path)
        after = dict(other.named_parameters())
        assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    (tmp_path / "fila.json").unlink()
    with pytest.raises(ValueError, match=r"has no fila\.json"):
        load_fila_adapter(copy.deepcopy(base), tmp_path)


def test_the_base_of_an_adapter_on_the_hub_is_checked(tmp_path, monkeypatch):
    base = build("llama")
    save_fila_adapter(trained(copy.deepcopy(base)), tmp_path)

    def download(name, file):
        if name == "someone/fila":
            return str(tmp_path / file)
        raise EntryNotFoundError(f"{name} has no {file}")

    monkeypatch.setattr("loku.fila.saving.hf_hub_download", download)
    check_fila_base(base, "someone/fila")
    check_fila_base(base, "someone/lora")
    with torch.no_grad():
        base.model.layers[0].self_attn.q_proj.weight.mul_(1.02)
    check_fila_base(base, "someone/lora")
    with pytest.raises(ValueError, match="the adapter in someone/fila belongs to another base model"):
        check_fila_base(base, "someone/fila")


@pytest.mark.parametrize("made", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("used", [torch.float32, torch.bfloat16, torch.float16])
def test_a_copy_of_the_base_in_another_dtype_is_the_same_base(tmp_path, made, used):
    base = build("llama", made)
    save_fila_adapter(trained(base), tmp_path)
    again = load_fila_adapter(copy.deepcopy(base).to(used), tmp_path)
    assert again.get_base_model().model.layers[0].mlp.up_proj.base_layer.weight.dtype == used


def test_a_base_without_some_of_the_modules_is_refused(tmp_path):
    base = build("llama")
    model = trained(base)
    save_fila_adapter(model, tmp_path)
    shorter = copy.deepcopy(base)
    shorter.model.layers = shorter.model.layers[:1]
    for check in (check_fila_base, load_fila_adapter):
        with pytest.raises(ValueError, match=r"LlamaForCausalLM has no .*layers\.1\.\S+ \(7 of 14 modules\)"):
            check(shorter, tmp_path)
    with pytest.raises(ValueError, match=r"GPT2LMHeadModel has no .* \(14 of 14 modules\)"):
        check_fila_base(build("gpt2"), tmp_path)
    for carrying in (model, model.get_base_model()):
        with pytest.raises(TypeError, match=r"must be the unmodified base model, .* carries adapters"):
            load_fila_adapter(carrying, tmp_path)


def test_a_base_whose_adapter_could_not_be_read_can_be_used_again(tmp_path):
    base = build("llama")
    model = trained(base)
    save_fila_adapter(model, tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    whole, other = weights.read_bytes(), copy.deepcopy(base)
    weights.write_bytes(whole[:-20])
    with pytest.raises(SafetensorError):
        load_fila_adapter(other, tmp_path)
    weights.write_bytes(whole)
    torch.testing.assert_close(logits(load_fila_adapter(other, tmp_path).eval()), logits(model.eval()))


def test_another_residual_is_refused(tmp_path):
    """A checkpoint whose initial factors are not the model's, or which lacks them."""
    base = build("llama")
    model = adapted(base)
    state = some_state(model)
    state["model.layers.1.mlp.up_proj"] = state["model.layers.1.mlp.up_proj"].flip(0)
    initialize_lora_fila_weights(model, state, show_progress_bar=False)
    save_fila_adapter(trained(base), tmp_path)
    with pytest.raises(RuntimeError, match=r"trained over another residual base"):
        model.load_adapter(tmp_path, "default")
    up = model.get_base_model().model.layers[1].mlp.up_proj
    assert torch.equal(up.lora_A["default"].weight, up.lora_A["default"].initial)
    raw = {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name}
    with pytest.raises(RuntimeError, match=r"must have the shape of a stored FILA adapter, 8 in dimension 0"):
        model.load_state_dict(raw, strict=False)


def test_the_record_names_settings_and_base(tmp_path):
    base = build("llama")
    save_fila_adapter(trained(base, use_rslora=True), tmp_path)
    record = json.loads((tmp_path / "fila.json").read_text())
    assert (
        record["config"]["mode"] == "residual" and record["adapter"]["r"] == 4 and record["adapter"]["lora_alpha"] == 6
    )
    assert record["fingerprints"].keys() == lora_layers(adapted(base), "default").keys()
    stored = json.loads((tmp_path / "adapter_config.json").read_text())
    assert stored["r"] == 8 and stored["lora_alpha"] / 8**0.5 == pytest.approx(6 / 4**0.5)


def test_only_fila_adapters_are_saved(tmp_path):
    model = adapted(build("llama"))
    for save in (save_fila_adapter, save_merged):
        with pytest.raises(ValueError, match="FILA was not applied to the adapter 'default'"):
            save(model, tmp_path)
    with pytest.raises(TypeError, match="model must be a PeftModel, got LlamaForCausalLM"):
        save_fila_adapter(build("llama"), tmp_path)
    assert not any(tmp_path.iterdir())


def test_a_tied_head_is_not_merged(tmp_path):
    model = trained(build("gpt2"), "shadow", target_modules=["c_attn", "lm_head"])
    with pytest.raises(ValueError, match="the weight of lm_head is tied to another module's, which merging would"):
        save_merged(model, tmp_path)
    assert not any(tmp_path.iterdir())
