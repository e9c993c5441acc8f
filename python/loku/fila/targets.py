"""The LoRA layers of an adapter, and what FILA cannot be applied to."""

from __future__ import annotations

from collections import Counter

from peft import PeftModel
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.layer import LoraLayer
from peft.utils.integrations import dequantize_module_weight, get_bnb_param_type
from torch import Tensor

from loku.sharding import is_sharded

_FRESH_STARTS = (True, False, "gaussian", "orthogonal")
_QUANTISED_LAYERS = ("Linear4bit", "Linear8bitLt")  # PEFT defines them only where bitsandbytes is installed


def lora_layers(model: PeftModel, adapter_name: str) -> dict[str, LoraLayer]:
    """Module name in the base model -> LoRA layer of the adapter.

    Raises:
        TypeError: model is no PeftModel.
        ValueError: it has no such adapter, or the adapter is not plain LoRA on linear layers.
    """
    if not isinstance(model, PeftModel):
        raise TypeError(f"model must be a PeftModel, got {type(model).__name__}; see peft.get_peft_model")
    if adapter_name not in model.peft_config:
        raise ValueError(f"adapter_name must be one of {sorted(model.peft_config)}, got {adapter_name!r}")
    layers = {}
    for name, layer in model.get_base_model().named_modules():
        if isinstance(layer, LoraLayer) and adapter_name in {**layer.lora_A, **layer.lora_embedding_A}:
            _check_kind(name, layer, adapter_name)
            layers[name] = layer
    if not layers:
        raise ValueError(f"the adapter {adapter_name!r} has no LoRA layer")
    return layers


def check_whole(layers: dict[str, LoraLayer]) -> None:
    """Raises ValueError unless this process holds the base weights."""
    for name, layer in layers.items():
        weight = layer.get_base_layer().weight
        if weight.device.type == "meta" or is_sharded(weight):
            raise ValueError(
                f"the weight of {name} is on the meta device or sharded, but a loaded, whole model is needed"
            )


def check_fresh(model: PeftModel, layers: dict[str, LoraLayer], adapter_name: str) -> None:
    """Raises ValueError unless the adapter is newly made and no layer is merged."""
    start = model.peft_config[adapter_name].init_lora_weights
    if start not in _FRESH_STARTS:
        raise ValueError(f"FILA starts from init_lora_weights in {_FRESH_STARTS}, got {start!r}")
    if model.peft_config[adapter_name].layer_replication:
        raise ValueError("FILA is defined for the layers of the base, but the adapter has layer_replication")
    for name, layer in layers.items():
        if layer.merged:
            raise ValueError(f"{name} is merged with {layer.merged_adapters}; call model.unmerge_adapter() first")
        if hasattr(layer.lora_A[adapter_name], "initial"):
            raise ValueError(f"FILA was already applied to the adapter {adapter_name!r} ({name})")
        if start in (True, "gaussian") and bool(layer.lora_B[adapter_name].weight.any()):
            raise ValueError(f"the adapter {adapter_name!r} was trained or loaded before: lora_B of {name} is not zero")


def check_residual(model: PeftModel, layers: dict[str, LoraLayer], adapter_name: str) -> None:
    """Raises ValueError where the base weights cannot, or must not, be changed."""
    others = sorted(set(model.peft_config) - {adapter_name})
    if others:
        raise ValueError(f"the residual mode would change the base under the adapters {others}; use mode='shadow'")
    for name, layer in layers.items():
        weight = layer.get_base_layer().weight
        if is_quantised(layer):
            raise ValueError(
                f"the residual mode cannot change the quantised weight of {name} ({type(weight).__name__}) without "
                "quantising anew; use mode='shadow'"
            )
        if hasattr(layer, "residual_of"):
            raise ValueError(
                f"the base weight of {name} is the residual that the adapter {layer.residual_of!r} left behind; load "
                "the base anew"
            )
    tied = tied_layer(model, layers)
    if tied is not None:
        raise ValueError(
            f"the weight of {tied} is tied to another module's, which the residual mode would change too; use "
            "mode='shadow' or leave it out of target_modules"
        )


def tied_layer(model: PeftModel, layers: dict[str, LoraLayer]) -> str | None:
    """The name of one of the layers whose base weight another module has, too; None if there is none."""
    holders = Counter(
        parameter.data_ptr()
        for _, parameter in model.get_base_model().named_parameters(remove_duplicate=False)
        if parameter.device.type != "meta"
    )
    return next((name for name, layer in layers.items() if holders[layer.get_base_layer().weight.data_ptr()] > 1), None)


def is_quantised(layer: LoraLayer) -> bool:
    weight = layer.get_base_layer().weight
    torchao = type(weight).__module__.startswith("torchao.")
    return bool(get_bnb_param_type(weight)) or not weight.is_floating_point() or torchao


def base_weight(layer: LoraLayer) -> Tensor:
    """The base weight as (out, in), dequantised if it must be; a view where it can be."""
    weight = dequantize_module_weight(layer.get_base_layer()).detach()
    return weight.T if layer.fan_in_fan_out else weight


def check_ranks(layers: dict[str, LoraLayer], adapter_name: str) -> None:
    for name, layer in layers.items():
        rank, size = layer.r[adapter_name], min(layer.out_features, layer.in_features)
        if rank > size:
            raise ValueError(
                f"the rank of {name} must be at most min(out, in) = {size}, got {rank}; lower it in rank_pattern"
            )


def _check_kind(name: str, layer: LoraLayer, adapter_name: str) -> None:
    kind = type(layer).__name__
    if not isinstance(layer, LoraLinear) and kind not in _QUANTISED_LAYERS:
        raise ValueError(f"FILA is defined for linear layers, but {name} is adapted by PEFT's {kind}")
    if adapter_name in layer.lora_variant and not hasattr(layer.lora_A[adapter_name], "initial"):
        variant = type(layer.lora_variant[adapter_name]).__name__
        raise ValueError(f"FILA is defined for plain LoRA, but {name} uses {variant} (DoRA or another variant)")
