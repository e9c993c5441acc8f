"""The shadow mode: W x + s (B A - B0 A0) x, with the base weight W left alone."""

from __future__ import annotations

import torch
from peft.tuners.lora.layer import LoraLayer, LoraVariant
from peft.utils.other import transpose
from torch import Tensor
from torch.nn.functional import linear


class ShadowVariant(LoraVariant):
    """PEFT's hook for another forward of one adapter of a layer: what LoRA adds, less what it added at the start.

    At the start the two are equal bit for bit (without dropout), so the model is exactly the base model. Dropout acts
    on the trained factors alone.
    """

    @staticmethod
    def forward(module: LoraLayer, *, active_adapter: str, x: Tensor, result: Tensor, **_: object) -> Tensor:
        a, b = module.lora_A[active_adapter], module.lora_B[active_adapter]
        trained = b(a(module.lora_dropout[active_adapter](x)))
        return result + (trained - linear(linear(x, a.initial), b.initial)) * module.scaling[active_adapter]

    @staticmethod
    def merge_safe(module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> Tensor:
        return orig_weight + _change(module, active_adapter).to(orig_weight.dtype)

    @staticmethod
    def merge_unsafe(module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> None:
        orig_weight.data += _change(module, active_adapter).to(orig_weight.dtype)

    @staticmethod
    def unmerge(module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> Tensor:
        return orig_weight - _change(module, active_adapter).to(orig_weight.dtype)


@torch.no_grad()
def _change(layer: LoraLayer, adapter_name: str) -> Tensor:
    """s (B A - B0 A0) in float32 or better, in the layout of the base weight."""
    a, b = layer.lora_A[adapter_name], layer.lora_B[adapter_name]
    wide = torch.promote_types(a.weight.dtype, torch.float32)
    stacked = torch.cat([b.weight, -b.initial], dim=1).to(wide) @ torch.cat([a.weight, a.initial]).to(wide)
    return transpose(stacked, layer.fan_in_fan_out) * layer.scaling[adapter_name]
