"""Saving what was trained, and going on from it."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import load_peft_weights
from torch import Tensor, nn

from loku.fila.config import FilaConfig
from loku.fila.fingerprint import check_fingerprints
from loku.fila.initialise import attach
from loku.fila.stored_form import RECORD_NAME, initial_factors, live_config
from loku.fila.targets import check_residual, check_whole, is_quantised, lora_layers, tied_layer
from loku.files import filling


def save_fila_adapter(
    model: PeftModel,
    path: str | os.PathLike,
    adapter_name: str = "default",
    *,
    state_dict: Mapping[str, Tensor] | None = None,
) -> None:
    """Saves the adapter as one of rank 2r that ``PeftModel.from_pretrained(base, path)`` loads on the unmodified base.

    Writes ``adapter_model.safetensors``, ``adapter_config.json``, a model card and ``fila.json`` (fingerprints of
    the base and the settings, for `load_fila_adapter`) into the folder ``path``, each under a temporary name first.

    Args:
        state_dict: the model's, where it is sharded: `loku.training.UnlearningTrainer.gathered_state_dict`.

    Raises:
        TypeError, ValueError: model is no PeftModel, or FILA was not applied to this adapter.
    """
    _check_initialised(model, adapter_name)
    with filling(path) as folder:
        model.save_pretrained(folder, selected_adapters=[adapter_name], state_dict=state_dict)
        if adapter_name != "default":  # PEFT puts it in a folder of its name
            for file in (folder / adapter_name).iterdir():
                file.rename(folder / file.name)
            (folder / adapter_name).rmdir()


def save_merged(model: PeftModel, path: str | os.PathLike, adapter_name: str = "default") -> None:
    """Saves the base model with the adapter merged in, for ``AutoModelForCausalLM.from_pretrained(path)``.

    Merges a copy of the model, which therefore must fit in memory twice; ``model`` stays as it is.

    Raises:
        TypeError, ValueError: as `save_fila_adapter`; a weight is quantised, sharded or tied to another module's.
    """
    layers = _check_initialised(model, adapter_name)
    check_whole(layers)
    quantised = next((name for name, layer in layers.items() if is_quantised(layer)), None)
    if quantised is not None:
        raise ValueError(
            f"the weight of {quantised} is quantised, and merging would round it anew; save the adapter, load it on "
            "the base model in floating point, and merge that"
        )
    tied = tied_layer(model, layers)
    if tied is not None:
        raise ValueError(
            f"the weight of {tied} is tied to another module's, which merging would change, too; save the adapter, and "
            "load it on the base model"
        )
    merged = copy.deepcopy(model).merge_and_unload(adapter_names=[adapter_name])
    with filling(path) as folder:
        merged.save_pretrained(folder)


@torch.no_grad()
def load_fila_adapter(
    base_model: nn.Module,
    path: str | os.PathLike,
    *,
    config: FilaConfig | None = None,
    adapter_name: str = "default",
) -> PeftModel:
    """A trainable PeftModel that goes on from a saved adapter, or from a trainer's checkpoint.

    To use the adapter, not train it, ``PeftModel.from_pretrained`` is enough. Here the stored rank-2r factors are taken
    apart again, and the residual base (or the shadow) is rebuilt from the adapter's own initial factors, without a
    weighted SVD.

    Args:
        base_model: the unmodified base model; its weights are compared with the fingerprints taken at the start.
        path: a folder written by `save_fila_adapter` or ``model.save_pretrained``.
        config: the mode and residual_dtype to go on with; by default those of the saved adapter.

    Raises:
        TypeError: base_model carries adapters already.
        ValueError: there is no FILA adapter at path, or base_model is not the one it belongs to.
    """
    if any(isinstance(module, BaseTunerLayer) for module in base_model.modules()):
        raise TypeError(
            f"base_model must be the unmodified base model, but this {type(base_model).__name__} carries adapters; "
            "load the base anew"
        )
    record_path = Path(path, RECORD_NAME)
    if not record_path.is_file():
        raise ValueError(f"{path} has no {RECORD_NAME}: no FILA adapter was saved there")
    record = json.loads(record_path.read_text())
    config = config or _config(record["config"])
    _check_record(base_model, record, path)
    stored = load_peft_weights(str(path), device="cpu")  # before base_model is changed
    model = get_peft_model(base_model, live_config(LoraConfig.from_pretrained(path), record), adapter_name=adapter_name)
    layers = lora_layers(model, adapter_name)
    check_whole(layers)
    if config.mode == "residual":
        try:
            check_residual(model, layers, adapter_name)
        except ValueError:
            model.unload()
            raise
    initial = {
        name: initial_factors(*(stored[f"base_model.model.{name}.lora_{x}.weight"] for x in "AB")) for name in layers
    }
    attach(model, layers, adapter_name, initial, config, record["importance"])
    model.load_adapter(str(path), adapter_name, is_trainable=True)
    return model


def check_fila_base(base_model: nn.Module, adapter: str | os.PathLike) -> None:
    """Raises ValueError if the FILA adapter saved in the folder ``adapter``, or of that name on the hub, belongs to
    another base model.

    Of an adapter without a record of FILA nothing is known, and nothing is checked.
    """
    record_path = _record_path(adapter)
    if record_path is not None:
        _check_record(base_model, json.loads(record_path.read_text()), adapter)


def _check_record(base_model: nn.Module, record: dict, adapter: str | os.PathLike) -> None:
    expected, modules = record["fingerprints"], dict(base_model.named_modules())
    missing = [name for name in expected if not hasattr(modules.get(name), "weight")]
    if missing:
        raise ValueError(
            f"the adapter in {adapter} belongs to another base model: {type(base_model).__name__} has no linear layer "
            f"{', '.join(missing[:3])} ({len(missing)} of {len(expected)} modules)"
        )
    check_fingerprints(expected, {name: modules[name].weight for name in expected}, f"the adapter in {adapter}")


def _record_path(adapter: str | os.PathLike) -> Path | None:
    if Path(adapter).is_dir():
        path = Path(adapter, RECORD_NAME)
        return path if path.is_file() else None
    try:
        return Path(hf_hub_download(str(adapter), RECORD_NAME))
    except (EntryNotFoundError, HFValidationError):  # if there is no adapter either, its loader says so
        return None


def _check_initialised(model: PeftModel, adapter_name: str) -> dict[str, LoraLayer]:
    layers = lora_layers(model, adapter_name)
    without = next((name for name, layer in layers.items() if not hasattr(layer.lora_A[adapter_name], "initial")), None)
    if without is not None:
        raise ValueError(f"FILA was not applied to the adapter {adapter_name!r}: {without} has no initial factors")
    return layers


def _config(settings: dict) -> FilaConfig:
    dtype = settings["residual_dtype"]
    return FilaConfig(**{**settings, "residual_dtype": dtype and getattr(torch, dtype.removeprefix("torch."))})
