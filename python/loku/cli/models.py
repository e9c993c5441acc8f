"""Models, tokenizers and adapters as the commands load and save them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from peft import LoraConfig, PeftModel
from peft.tuners.lora.layer import LoraLayer
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Tokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
)
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.pytorch_utils import Conv1D

from loku.cli.errors import CommandError, blaming, warn
from loku.cli.options import AdapterOptions, ModelOptions
from loku.cli.settings_files import read_mapping
from loku.fila.saving import check_fila_base
from loku.fila.targets import tied_layer

_ATTENTION = ("attn", "attention")
_MLP = ("mlp", "feed_forward", "ffn")
_OF_SIZES = (ArithmeticError, AssertionError, RuntimeError)  # what models raise for no heads, a negative width, ...


def load_model(options: ModelOptions) -> PreTrainedModel:
    """The model, with the adapters given merged into it.

    Raises CommandError where one of them is missing, or is none, or a FILA adapter belongs to another base model.
    """
    if options.model is None:
        raise CommandError("--model is required: a folder or a name on the hub")
    arguments = {"dtype": options.dtype, "trust_remote_code": options.trust_remote_code}
    if options.attn_implementation is not None:
        arguments["attn_implementation"] = options.attn_implementation
    with blaming(f"--model {options.model}", ImportError):  # of an attention that is not installed, for example
        model = AutoModelForCausalLM.from_pretrained(options.model, **arguments)
    for place, adapter in enumerate(options.adapter or []):
        with blaming(f"--adapter {adapter}", RuntimeError):  # torch's, for weights of other shapes
            _check_base(model, adapter, merged=place > 0)
            model = _merged(PeftModel.from_pretrained(model, adapter))
    if torch.cuda.is_available():
        model = model.to(f"cuda:{os.environ.get('LOCAL_RANK', '0')}")
    return model


def _merged(model: PeftModel) -> PreTrainedModel:
    """Raises ValueError if the adapter cannot be merged, or merging would change what it does not adapt."""
    if model.active_peft_config.is_prompt_learning:
        raise ValueError(f"it is of the kind {model.active_peft_config.peft_type.value}, which has no weights to merge")
    layers = {
        name: layer
        for name, layer in model.get_base_model().named_modules()
        if isinstance(layer, LoraLayer) and hasattr(layer.get_base_layer(), "weight")
    }
    tied = tied_layer(model, layers)
    if tied is not None:
        raise ValueError(f"the weight of {tied}, which it adapts, is another module's too, which merging would change")
    return model.merge_and_unload(progressbar=True)


def mend_generation_config(model: PreTrainedModel) -> None:
    """Some models were published with settings of sampling but without do_sample, which can be loaded, not saved."""
    config = model.generation_config
    if config is None:  # of a model that does not generate
        return
    try:
        config.validate(strict=True)
    except ValueError:
        warn("the model's generation_config has settings of sampling, but not do_sample, which is set therefore")
        config.do_sample = True


def _check_base(model: PreTrainedModel, adapter: str, merged: bool) -> None:
    """Raises ValueError if a FILA adapter belongs to another base model, or to one ``merged`` in another dtype."""
    try:
        check_fila_base(model, adapter)
    except ValueError as error:
        if not merged:
            raise
        dtype = str(model.dtype).removeprefix("torch.")
        raise ValueError(
            f"the adapters before it were merged in {dtype}, and must be those of its run, and --dtype the one in its "
            f"run's config.yaml, as each rounds differently: {error}"
        ) from error


@contextmanager
def held_whole(args: TrainingArguments) -> Iterator[None]:
    """Models made inside are whole in every process, as FILA needs them: DeepSpeed's ZeRO-3 then takes them apart only
    when training begins."""
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if args.deepspeed_plugin is not None:
            args.deepspeed_plugin.set_deepspeed_weakref()


def model_from_config(path: str, tokenizer: PreTrainedTokenizerBase, dtype: str) -> PreTrainedModel:
    """A model with new weights. ``path``: YAML or JSON with ``model_type`` and what that type's configuration takes.

    Where the file does not say, ``vocab_size`` and the ids of special tokens are the tokenizer's.

    Raises:
        CommandError: the file is none, or has a key or a value that the type's configuration does not take.
    """
    values = read_mapping(path, "--model_config")
    if "model_type" not in values:
        raise CommandError(f"--model_config {path} has no model_type, such as gpt_neo, phi or llama")
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    with blaming(f"--model_config {path}", StrictDataclassError, KeyError, TypeError, *_OF_SIZES):
        known = AutoConfig.for_model(values["model_type"])
        unknown = [key for key in values if key not in {*known.to_dict(), *known.attribute_map}]
        if unknown and "transformers_version" not in values:  # which has written it, with keys of its time
            raise CommandError(f"--model_config {path}: a {values['model_type']} has no {', '.join(unknown)}")
        config = AutoConfig.for_model(**{"vocab_size": len(tokenizer), **special, **values})
        chosen = torch.float32 if dtype == "auto" else getattr(torch, dtype)
        return AutoModelForCausalLM.from_config(config, dtype=chosen)


def load_tokenizer(options: ModelOptions) -> PreTrainedTokenizerBase:
    """The tokenizer, with its EOS for padding where it has no padding token, as the benchmarks do.

    A folder may hold GPT-2's as OpenAI published it, ``vocab.json`` and ``merges.txt`` alone.
    """
    source = options.tokenizer or options.model
    if source is None:
        raise CommandError("--tokenizer or --model is required")
    with blaming(f"the tokenizer {source}"):
        if Path(source).is_dir() and {file.name for file in Path(source).iterdir()} == {"vocab.json", "merges.txt"}:
            tokenizer = GPT2Tokenizer.from_pretrained(source)
        else:
            tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=options.trust_remote_code)
    if tokenizer.eos_token_id is None:
        raise CommandError(f"the tokenizer {source} has no EOS token, which ends every answer: set eos_token in it")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def lora_config(model: nn.Module, options: AdapterOptions) -> LoraConfig:
    """PEFT's configuration of the adapter. Raises CommandError if the rank is not one that all targets can have."""
    targets = target_modules(model, options.targets)
    for name, module in model.named_modules():
        if f".{name}".endswith(tuple(f".{target}" for target in targets)) and options.rank > min(module.weight.shape):
            raise CommandError(f"--rank {options.rank} exceeds {min(module.weight.shape)}, the smaller side of {name}")
    alpha = 2 * options.rank if options.alpha is None else options.alpha
    return LoraConfig(
        r=options.rank,
        lora_alpha=alpha,
        target_modules=targets,
        lora_dropout=options.lora_dropout,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
        task_type="CAUSAL_LM",
    )


def target_modules(model: nn.Module, targets: str) -> list[str]:
    """The linear layers meant: ``all`` but the head, those in attention blocks (``attn``), in MLPs, or as named.

    Some models, such as OPT, have no block for the MLP: there it is what stands in the decoder layers beside attention.
    Of a model that also sees or hears, only what works on text is meant. Layers of one output or input, such as the
    gates of experts, and routers, which return more than a product, are meant only where they are named.

    Raises CommandError if there is none, if one of several names is none's, or if the head is named where its weight is
    the input embedding's too.
    """
    head = model.get_output_embeddings()
    layers = _text_layers(model, head)
    linear = [name for name, module in layers.items() if module is not head and not _is_gate(module)]
    if targets == "attn":
        chosen = _within(linear, _ATTENTION)
    elif targets == "mlp":
        chosen = _within(linear, _MLP) or _beside_attention(linear)
    elif targets == "all":
        chosen = linear
    else:
        names = [target.strip() for target in targets.split(",") if target.strip()]
        for target in names:
            if not any(f".{name}".endswith(f".{target}") for name in layers):
                raise _no_layer(target, linear)
        chosen = [name for name in layers if f".{name}".endswith(tuple(f".{target}" for target in names))]
    if not chosen:
        raise _no_layer(targets, linear)
    for name in chosen:
        if layers[name] is head and head.weight is model.get_input_embeddings().weight:
            raise CommandError(
                f"--targets {targets!r} names the head, {name}, whose weight is the input embedding's too: an adapter "
                "of the one cannot be merged without changing the other"
            )
    return _short_names(chosen, [name for name, _ in model.named_modules()])


def _text_layers(model: PreTrainedModel, head: nn.Module | None) -> dict[str, nn.Module]:
    """Name -> linear layer, of the text decoder and the head."""
    decoder = model.get_decoder()
    inside = set(model.modules() if decoder is None else decoder.modules()) | {head}
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    return {name: module for name, module in linear.items() if module in inside}


def _is_gate(module: nn.Module) -> bool:
    return min(module.weight.shape) == 1 or "Router" in type(module).__name__


def _no_layer(targets: str, layers: list[str]) -> CommandError:
    kinds = ", ".join(sorted({name.rpartition(".")[2] for name in layers}))
    return CommandError(f"--targets {targets!r} names no linear layer of the model, which has {kinds}")


def _within(names: list[str], parts: tuple[str, ...]) -> list[str]:
    """Those in a block whose name has one of the parts."""
    return [name for name in names if any(part in block for block in name.split(".")[:-1] for part in parts)]


def _beside_attention(names: list[str]) -> list[str]:
    """Those that stand in a layer, which is a number in their names, but in none of its attention blocks."""
    attention = _within(names, _ATTENTION)
    if not attention:
        return []  # in Mamba, say, what stands in the layers is no MLP
    return [name for name in names if name not in attention and any(map(str.isdecimal, name.split(".")))]


def _short_names(chosen: list[str], names: list[str]) -> list[str]:
    """The shortest ends of the chosen names that no other module's name has, as adapter configurations give them."""
    others = set(names) - set(chosen)
    for depth in range(1, 1 + max(name.count(".") for name in chosen)):
        ends = sorted({".".join(name.split(".")[-depth:]) for name in chosen})
        if not any(f".{name}".endswith(tuple(f".{end}" for end in ends)) for name in others):
            return ends
    return chosen
