"""The residual mode: the base weight becomes W - s B0 A0.

With the adapter switched off PEFT would compute with that residual, which is no model of interest, and a reference
model taken by ``model.disable_adapter()`` would be wrong without a sign of it. So the initial factors are then added
back.
"""

from __future__ import annotations

from functools import partial

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn
from torch.nn.functional import linear

from loku.fila.factors import Factors, residual_weight
from loku.fila.targets import base_weight


@torch.no_grad()
def subtract_initial(layer: LoraLayer, adapter_name: str, initial: Factors, dtype: torch.dtype | None) -> None:
    """Replaces the base weight, in ``dtype`` or its own, and adds the initial part back while the adapter is off.

    In a dtype that is not the weight's own the base layer's product runs in that dtype, and its output is cast back.
    """
    base = layer.get_base_layer()
    own = base.weight.dtype
    residual = residual_weight(base_weight(layer), initial, layer.scaling[adapter_name], dtype or own)
    base.weight.data = (residual.T if layer.fan_in_fan_out else residual).contiguous()
    layer.register_forward_hook(partial(_add_initial_while_off, adapter_name=adapter_name), with_kwargs=True)
    if base.weight.dtype != own:
        if base.bias is not None:
            base.bias.data = base.bias.data.to(base.weight.dtype)
        base.register_forward_pre_hook(_cast_input)
        base.register_forward_hook(partial(_cast_output, dtype=own))


def _add_initial_while_off(
    layer: LoraLayer, args: tuple[Tensor, ...], kwargs: dict, output: Tensor, *, adapter_name: str
) -> Tensor:
    if set(kwargs.get("adapter_names") or [adapter_name]) != {adapter_name}:
        raise ValueError("batches that mix adapters need a base that is left alone; use FILA's mode='shadow'")
    if adapter_name not in layer.lora_A:
        raise RuntimeError(
            f"the FILA adapter {adapter_name!r} was deleted, which leaves its residual base behind; load the base anew"
        )
    on = adapter_name in layer.active_adapters or adapter_name in layer.merged_adapters
    if on and not layer.disable_adapters:
        return output
    A, B = layer.lora_A[adapter_name].initial, layer.lora_B[adapter_name].initial
    return output + (linear(linear(args[0].to(A.dtype), A), B) * layer.scaling[adapter_name]).to(output.dtype)


def _cast_input(base: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (args[0].to(base.weight.dtype), *args[1:])


def _cast_output(_base: nn.Module, _args: tuple[Tensor, ...], output: Tensor, *, dtype: torch.dtype) -> Tensor:
    return output.to(dtype)
