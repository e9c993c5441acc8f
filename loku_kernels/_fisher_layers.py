"""The weights whose Fisher information is wanted, and the modules that use them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from loku_kernels.backends.reference import compute_dtype


class Layer:
    """One weight matrix, its accumulator, and what the backward pass at hand has brought for it so far."""

    def __init__(self, name: str, module: nn.Module) -> None:
        self.names, self.modules = [name], [module]
        self.transposed = _is_conv1d(module)
        weight = module.weight
        # A quantised weight is packed; its Fisher information is not.
        self.shape = tuple(weight.shape) if self.transposed else (module.out_features, module.in_features)
        self.device, self.dtype = weight.device, compute_dtype(weight.dtype)
        self.fisher: Tensor | None = None
        self.begin_batch()

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def bytes(self) -> int:
        return self.shape[0] * self.shape[1] * self.dtype.itemsize

    def begin_batch(self) -> None:
        self.forwards = 0
        self.added = False
        self.uses: list[tuple[Tensor, Tensor]] = []

    def allocate(self) -> None:
        self.fisher = torch.zeros(self.shape, dtype=self.dtype, device=self.device)


def find_layers(model: nn.Module, target_modules: str | Sequence[str] | None) -> list[Layer]:
    """One ``Layer`` for each weight of the selected nn.Linear and Conv1D modules, in the model's order."""
    layers: dict[int, Layer] = {}
    for name, module in _linear_modules(model):
        if not _selected(model, name, module, target_modules):
            continue
        layer = layers.get(id(module.weight))
        if layer is None:
            layers[id(module.weight)] = Layer(name, module)
        else:
            layer.names.append(name)
            layer.modules.append(module)
    if not layers:
        raise ValueError(f"target_modules selects no nn.Linear or Conv1D of the model: {target_modules!r}")
    _refuse_weights_shared_with_others(model, layers)
    return list(layers.values())


def in_groups(layers: list[Layer], memory_budget: int | None, accumulators: int) -> list[list[Layer]]:
    """Runs of layers, in order, such that ``accumulators`` times a run's Fisher matrices stay within the budget."""
    if memory_budget is None:
        return [layers]
    groups: list[list[Layer]] = []
    room = 0
    for layer in layers:
        need = accumulators * layer.bytes
        if need > memory_budget:
            raise ValueError(
                f"memory_budget must hold {accumulators} accumulators of every layer, but {layer.name} alone needs "
                f"{need} bytes and the budget is {memory_budget}"
            )
        if need > room:
            groups.append([])
            room = memory_budget
        groups[-1].append(layer)
        room -= need
    return groups


def _linear_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Linear modules under the name of the layer: an adapter's wrapped layer bears the wrapper's name, its own parts
    are left out."""
    wrappers = {name for name, module in model.named_modules() if isinstance(_base_layer(module), nn.Module)}
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) or _is_conv1d(module):
            name = _unwrapped_name(path, wrappers)
            if name is not None:
                yield name, module


def _base_layer(module: nn.Module) -> nn.Module | None:
    return module._modules.get("base_layer")


def _unwrapped_name(path: str, wrappers: set[str]) -> str | None:
    prefix, parts = "", []
    for part in path.split("."):
        if prefix in wrappers:
            if part != "base_layer":
                return None
        else:
            parts.append(part)
        prefix = f"{prefix}.{part}" if prefix else part
    return ".".join(parts)


def _is_conv1d(module: nn.Module) -> bool:
    """transformers' Conv1D, a linear layer whose weight is (in, out), without importing transformers."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def _selected(model: nn.Module, name: str, module: nn.Module, target_modules: str | Sequence[str] | None) -> bool:
    if target_modules is None:
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        return module is not head and module is not (head and _base_layer(head))
    if isinstance(target_modules, str):
        return re.fullmatch(target_modules, name) is not None
    return any(name == target or name.endswith(f".{target}") for target in target_modules)


def _refuse_weights_shared_with_others(model: nn.Module, layers: dict[int, Layer]) -> None:
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            layer = layers.get(id(parameter))
            if layer is not None and module not in layer.modules:
                raise ValueError(
                    f"the weight of {layer.name} is also that of {name} ({type(module).__name__}), whose share of the "
                    "gradient would be missed: leave it out of target_modules, or select every module that has it"
                )
