"""How a FILA adapter is stored: as a rank-2r adapter for the unmodified base model.

Trained factors B, A over the residual base are W - s B0 A0 + s B A = W + s [B, -B0] [A; A0], so an adapter with the
factors [A; A0] and [B, -B0] and the same scaling s does on W what the live one does on its residual. The live
adapter keeps A0 and B0 as buffers; hooks on its state dict write the stacked factors and read them back, and its
configuration is written with twice the rank. So whatever saves the adapter (PEFT, a trainer's checkpoint) saves what
loads on the unmodified base.
"""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from loku.fila.factors import Factors
from loku.files import write_json

RECORD_NAME = "fila.json"
_RANKS = ("r", "lora_alpha", "rank_pattern", "alpha_pattern")


class FilaLoraConfig(LoraConfig):
    """The live adapter's configuration, which is written with twice its rank and unchanged scaling.

    Beside ``adapter_config.json`` it writes ``fila.json``: what is needed to go on training (`load_fila_adapter`).
    """

    record: dict[str, object]

    @classmethod
    def of(cls, config: LoraConfig, record: dict[str, object]) -> FilaLoraConfig:
        new = cls.__new__(cls)
        new.__dict__.update(copy.copy(config.__dict__))
        new.record = {**record, "adapter": {name: getattr(config, name) for name in (*_RANKS, "init_lora_weights")}}
        return new

    def __post_init__(self) -> None:
        """ValueError: another configuration made of this one, as ``add_weighted_adapter`` makes one, knows nothing of
        the initial factors."""
        raise ValueError(
            "a FILA adapter cannot be combined with others in a live model, where its initial factors would be lost; "
            "load it from where it was saved, with PeftModel.from_pretrained on the unmodified base, and combine that"
        )

    def to_dict(self) -> dict:
        stored = super().to_dict()
        factor = 2**0.5 if self.use_rslora else 2  # the scaling is alpha / sqrt(r), or alpha / r
        stored["r"] *= 2
        stored["lora_alpha"] *= factor
        stored["rank_pattern"] = {key: 2 * rank for key, rank in stored["rank_pattern"].items()}
        stored["alpha_pattern"] = {key: factor * alpha for key, alpha in stored["alpha_pattern"].items()}
        stored["init_lora_weights"] = True
        return stored

    def save_pretrained(self, save_directory: str, **kwargs) -> None:
        super().save_pretrained(save_directory, **kwargs)
        write_json(Path(save_directory, RECORD_NAME), self.record)


def fila_adapters(model: nn.Module) -> set[str]:
    """The names of the model's adapters that were started by FILA."""
    configs = model.peft_config if isinstance(model, PeftModel) else {}
    return {name for name, config in configs.items() if isinstance(config, FilaLoraConfig)}


def has_fila(model: nn.Module) -> bool:
    """Whether an adapter of the model was started by FILA."""
    return bool(fila_adapters(model))


def live_config(stored: LoraConfig, record: dict) -> LoraConfig:
    """The configuration of the live adapter, from what `FilaLoraConfig` wrote."""
    live = copy.copy(stored)
    live.__dict__.update(record["adapter"], inference_mode=False)
    return live


def keep_initial(layer: LoraLayer, adapter_name: str, initial: Factors) -> None:
    """Gives the adapter its initial factors, frozen, and the stored form of its state."""
    modules = (layer.lora_A[adapter_name], layer.lora_B[adapter_name])
    for module, factor, dim, sign in zip(modules, initial, (0, 1), (1, -1), strict=True):
        module.register_buffer("initial", factor.to(module.weight.device, module.weight.dtype), persistent=False)
        module.register_state_dict_post_hook(partial(_store, dim=dim, sign=sign))
        module.register_load_state_dict_pre_hook(partial(_restore, dim=dim, sign=sign))


def leave_base_out(layer: LoraLayer) -> None:
    """Keeps the residual weight of an output head out of the state dict, and the live one whatever is loaded.

    PEFT stores the base weight of an adapted head with the adapter. On the unmodified base model, which is what the
    stored factors are for, the residual would take the place of the head's own weight.
    """
    layer.register_state_dict_post_hook(_drop_base)
    layer.register_load_state_dict_pre_hook(_keep_base)


def initial_factors(A: Tensor, B: Tensor) -> Factors:
    """A0 and B0 from the stored [A; A0] (2r, in) and [B, -B0] (out, 2r)."""
    return Factors(A.chunk(2, dim=0)[1], -B.chunk(2, dim=1)[1])


def _store(module: nn.Module, state: dict[str, Tensor], prefix: str, _metadata: object, *, dim: int, sign: int) -> None:
    trained = _whole(state[f"{prefix}weight"].detach())
    state[f"{prefix}weight"] = torch.cat([trained, sign * module.initial.to(trained)], dim=dim)


def _restore(module, state, prefix, _metadata, _strict, _missing, _unexpected, errors, *, dim: int, sign: int) -> None:
    key = f"{prefix}weight"
    if key not in state:
        return
    weight = module.weight.detach()
    stored, state[key] = _whole(state[key]), weight
    if stored.shape[dim] != 2 * module.weight.shape[dim]:
        errors.append(
            f"{key} must have the shape of a stored FILA adapter, {2 * module.weight.shape[dim]} in dimension {dim} "
            f"(trained and initial factors), got {tuple(stored.shape)}."
        )
        return
    trained, initial = stored.chunk(2, dim=dim)
    if not torch.equal(sign * initial.to(module.initial), module.initial):
        errors.append(
            f"the initial factors of {key} differ from this model's: the adapter was trained over another residual "
            "base. Go on from it with loku.fila.load_fila_adapter on the unmodified base model."
        )
        return
    if isinstance(weight, DTensor):
        trained = distribute_tensor(trained, weight.device_mesh, weight.placements)
    state[key] = trained


def _drop_base(_layer: nn.Module, state: dict[str, Tensor], prefix: str, _metadata: object) -> None:
    del state[f"{prefix}base_layer.weight"]


def _keep_base(layer: nn.Module, state: dict[str, Tensor], prefix: str, *_: object) -> None:
    state[f"{prefix}base_layer.weight"] = layer.base_layer.weight


def _whole(tensor: Tensor) -> Tensor:
    """All of a tensor that FSDP has sharded, on every rank."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
