"""The residual mode: the base weight becomes W - s B0 A0.

Wherever the adapter is off, or the layer is unloaded without it, PEFT would go on with that residual, which is no model
of interest, and a reference model taken by ``model.disable_adapter()`` would be wrong without a sign of it. So the
initial factors are then added back.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn
from torch.nn.functional import linear

from loku.fila.factors import Factors, residual_weight
from loku.fila.targets import base_weight


class ResidualLinear(LoraLinear):
    """PEFT's LoRA layer, over W - s B0 A0. Layers become it where they are."""

    residual_of: str  # the adapter that W - s B0 A0 belongs to
    residual_scaling: float  # s; PEFT's scale_layer changes the adapter's own
    merged_scaling: float  # as it was when the adapter was merged

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """RuntimeError if the adapter was deleted."""
        a, b = self._initial()
        output = super().forward(x, *args, **kwargs)
        names = kwargs.get("adapter_names")
        on = self.residual_of in self.active_adapters or self.residual_of in self.merged_adapters
        if names is None or self.disable_adapters:
            missing = self._missing(on and not self.disable_adapters)
            if missing == 0:
                return output
        else:  # each row of the batch names its adapter
            rows = [self._missing(name == self.residual_of) for name in names]
            missing = a.new_tensor(rows).reshape(-1, *[1] * (output.dim() - 1))
        return output + (linear(linear(x.to(a.dtype), a), b) * missing).to(output.dtype)

    def merge(self, *args: Any, **kwargs: Any) -> None:
        if self.residual_of not in self.merged_adapters:
            self.merged_scaling = self.scaling.get(self.residual_of)
        super().merge(*args, **kwargs)

    @torch.no_grad()
    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """What PEFT puts in the layer's place. RuntimeError if the adapter was deleted."""
        initial = self._initial()
        if merge:
            self.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        missing = self._missing(self.residual_of in self.merged_adapters)
        if missing != 0:
            _subtract(self, initial, -missing, self.get_base_layer().weight.dtype)
        return self.get_base_layer()

    def _missing(self, on: bool) -> float:
        """How much of B0 A0 is to be added for W, or with the adapter ``on``, for W + its scaling * (B A - B0 A0)."""
        if not on:
            return self.residual_scaling
        is_merged = self.residual_of in self.merged_adapters
        scaling = self.merged_scaling if is_merged else self.scaling[self.residual_of]
        return 0.0 if math.isclose(scaling, self.residual_scaling) else self.residual_scaling - scaling

    def _initial(self) -> Factors:
        name = self.residual_of
        if name not in self.lora_A:
            raise RuntimeError(
                f"the FILA adapter {name!r} was deleted, which leaves its residual base behind; load the base anew"
            )
        return Factors(self.lora_A[name].initial, self.lora_B[name].initial)


@torch.no_grad()
def subtract_initial(layer: LoraLinear, adapter_name: str, initial: Factors, dtype: torch.dtype | None) -> None:
    """Replaces the base weight, in ``dtype`` or its own, and adds the initial part back while the adapter is off.

    In a dtype that is not the weight's own the base layer's product runs in that dtype, and its output is cast back.
    """
    base = layer.get_base_layer()
    own = base.weight.dtype
    _subtract(layer, initial, layer.scaling[adapter_name], dtype or own)
    layer.__class__ = ResidualLinear
    layer.residual_of, layer.residual_scaling = adapter_name, layer.scaling[adapter_name]
    if base.weight.dtype != own:
        if base.bias is not None:
            base.bias.data = base.bias.data.to(base.weight.dtype)
        base.register_forward_pre_hook(_cast_input)
        base.register_forward_hook(partial(_cast_output, dtype=own))


def _subtract(layer: LoraLinear, initial: Factors, scaling: float, dtype: torch.dtype) -> None:
    residual = residual_weight(base_weight(layer), initial, scaling, dtype)
    layer.get_base_layer().weight.data = (residual.T if layer.fan_in_fan_out else residual).contiguous()


def _cast_input(base: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (args[0].to(base.weight.dtype), *args[1:])


def _cast_output(_base: nn.Module, _args: tuple[Tensor, ...], output: Tensor, *, dtype: torch.dtype) -> Tensor:
    return output.to(dtype)
