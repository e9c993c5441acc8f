"""The model before unlearning, with which some methods compare: the one in training with its adapter off."""

from __future__ import annotations

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn


def check_reference(model: nn.Module, why: str) -> None:
    """Raises ValueError, which says ``why`` it is wanted, unless the model with its adapter off is the one before
    unlearning, and stays it."""
    if not isinstance(model, PeftModel):
        raise ValueError(
            f"{why}, which is the one with its adapter off: model must be a PeftModel, got {type(model).__name__}"
        )
    biases = [config.bias for config in model.peft_config.values() if getattr(config, "bias", "none") != "none"]
    if biases:
        raise ValueError(
            f"{why}, but bias={biases[0]!r} in the adapter's configuration trains biases of the base; set it to 'none'"
        )
    if not isinstance(model.base_model, BaseTuner):
        return  # prompts and the like, which are apart from the base
    trained = {name: _adapter_of(model, name) for name, weight in model.named_parameters() if weight.requires_grad}
    base = [name for name, adapter in trained.items() if adapter is None]
    if base:
        raise ValueError(f"{why}, but {base[0]} of the base is trained too; freeze it")
    frozen = set(model.active_adapters).difference(trained.values())
    if trained and frozen:
        raise ValueError(
            f"{why}, but with its adapters off it lacks {min(frozen)!r} too, which is active and not trained; merge "
            "that into the base first"
        )


def _adapter_of(model: PeftModel, parameter: str) -> str | None:
    """The adapter that a parameter belongs to, None for the base: what is not in a layer of PEFT's own, or in the layer
    that one of those wraps."""
    module, adapter, parts = model, None, parameter.split(".")
    for i, part in enumerate(parts[:-1]):
        module = getattr(module, part)
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            adapter = next((name for name in parts[i + 1 :] if name in model.peft_config), None)
        elif part in ("base_layer", "original_module"):
            adapter = None
    return adapter
