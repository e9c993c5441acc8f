"""Small models, adapters, sequences and trainers, and what a sequence's loss is by definition."""

from __future__ import annotations

import copy

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from small_models import VOCABULARY, build
from torch import Tensor, nn
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaForCausalLM,
)

from loku.data import Example, PairedDataset, Role, UnlearningCollator
from loku.fila import FilaStateDict, initialize_lora_fila_weights
from loku.fila.targets import lora_layers
from loku.training import UnlearnConfig, UnlearningTrainer

_SIZES = {"hidden_size": 32, "intermediate_size": 48, "vocab_size": VOCABULARY, "max_position_embeddings": 64}
_LAYERS = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "initializer_range": 0.15}
_TOKENS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}


def causal_lm(family: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The families of `small_models`, and those that do something to their logits after the head."""
    torch.manual_seed(1)
    common = {**_SIZES, **_LAYERS, **_TOKENS}
    if family == "gemma2":  # logits up to a few times the cap
        model = Gemma2ForCausalLM(Gemma2Config(head_dim=16, final_logit_softcapping=0.7, **common))
    elif family == "cohere":
        model = CohereForCausalLM(CohereConfig(logit_scale=0.3, **common))
    elif family == "granite":
        model = GraniteForCausalLM(GraniteConfig(logits_scaling=3.0, **common))
    elif family == "llama_tied":
        config = build("llama").config
        config.tie_word_embeddings = True
        torch.manual_seed(1)
        model = LlamaForCausalLM(config)
    else:
        return build(family, dtype)
    return model.to(dtype).eval()


def with_adapter(base: nn.Module, **options) -> PeftModel:
    """LoRA on a copy, with random weights throughout, so that the adapter does something."""
    settings = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **options}
    model = get_peft_model(copy.deepcopy(base), LoraConfig(**settings))
    generator = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = (0.3 * torch.randn(parameter.shape, generator=generator)).to(parameter.dtype)
    return model


def with_fila(base: nn.Module, **options) -> PeftModel:
    """A new FILA adapter, from row weights that are the same each time."""
    settings = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **options}
    model = get_peft_model(copy.deepcopy(base), LoraConfig(**settings))
    generator = torch.Generator().manual_seed(2)
    sizes = {name: layer.out_features for name, layer in lora_layers(model, "default").items()}
    state = FilaStateDict({name: torch.rand(size, generator=generator) + 0.1 for name, size in sizes.items()})
    initialize_lora_fila_weights(model, state, show_progress_bar=False)
    return model


def sequences(count: int, seed: int, shortest: int = 4, longest: int = 14) -> list[Example]:
    """Random tokens, the first one to three of them a prompt without labels."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        length = int(torch.randint(shortest, longest + 1, (), generator=generator))
        prompt = int(torch.randint(1, 4, (), generator=generator))
        ids = torch.randint(VOCABULARY, (length,), generator=generator).tolist()
        found.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return found


def batch_of(examples: dict[Role, list[Example]], row_tokens: int | None = None) -> dict[str, Tensor]:
    pairs = PairedDataset(examples)
    return UnlearningCollator(0, row_tokens)([pairs[i] for i in range(len(pairs))])


def scored_logits(model: nn.Module, example: Example) -> tuple[Tensor, Tensor]:
    """By definition: the logits (n, V) of one sequence alone at its scored tokens, and those tokens (n,)."""
    ids, labels = torch.tensor(example["input_ids"]), torch.tensor(example["labels"])[1:]
    logits = model(input_ids=ids[None]).logits[0, :-1]
    return logits[labels != -100], labels[labels != -100]


def trainer(model, folder, forget=None, retain=None, preferred=None, callbacks=(), eval_dataset=None, **options):
    settings = {
        "method": "ihl", "max_steps": 4, "per_device_train_batch_size": 2, "learning_rate": 0.02, "report_to": [],
        "disable_tqdm": True, "use_cpu": True, "save_strategy": "no", "logging_steps": 1, "seed": 3, **options,
    }  # fmt: skip
    args = UnlearnConfig(str(folder), **settings)
    others = {"callbacks": list(callbacks), "eval_dataset": eval_dataset}
    return UnlearningTrainer(model, args, forget, retain, preferred, **others)


def trained_weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
