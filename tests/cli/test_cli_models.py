"""Adapters that are merged, layers that are meant, and what a model cannot be saved with."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2MoeConfig, Qwen2MoeForCausalLM

from loku.cli.errors import CommandError
from loku.cli.models import load_model, mend_generation_config, target_modules
from loku.cli.options import ModelOptions

SIZES = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}


def saved(tmp_path, config, tied):
    """A model with an adapter of random weights, in two folders."""
    model = LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=tied))
    model.save_pretrained(tmp_path / "model")
    model = get_peft_model(model, config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(tmp_path / "adapter")
    return model.eval(), ModelOptions(model=str(tmp_path / "model"), adapter=[str(tmp_path / "adapter")])


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_an_adapter_of_a_shared_weight_is_not_merged(tmp_path, target):
    config = LoraConfig(r=2, target_modules=["q_proj", target])
    _, options = saved(tmp_path, config, tied=True)
    with pytest.raises(CommandError, match=f"{target}, which it adapts, is another module's too"):
        load_model(options)
    model, options = saved(tmp_path / "untied", config, tied=False)
    tokens = torch.arange(8)[None]
    torch.testing.assert_close(load_model(options)(tokens).logits, model(tokens).logits, rtol=1e-4, atol=1e-5)


def test_prompts_cannot_be_merged(tmp_path):
    _, options = saved(tmp_path, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2), tied=False)
    with pytest.raises(CommandError, match="PROMPT_TUNING, which has no weights to merge"):
        load_model(options)


def test_gates_of_experts_are_meant_only_by_name():
    config = Qwen2MoeConfig(
        **SIZES, num_key_value_heads=2, num_experts=2, moe_intermediate_size=8, shared_expert_intermediate_size=8
    )
    model = Qwen2MoeForCausalLM(config)
    assert "shared_expert_gate" not in target_modules(model, "all")
    assert target_modules(model, "shared_expert_gate") == ["shared_expert_gate"]


def test_sampling_without_do_sample_can_be_saved(tmp_path, capsys):
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    mend_generation_config(model)
    assert not model.generation_config.do_sample and capsys.readouterr().err == ""
    model.generation_config.temperature = 0.9
    mend_generation_config(model)
    assert "do_sample, which is set" in capsys.readouterr().err
    model.save_pretrained(tmp_path)
