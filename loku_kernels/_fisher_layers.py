"""The weights whose Fisher information is wanted, and the modules that use them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from loku_kernels.backends.reference import compute_dtype


class Layer:
    """One weight matrix, its accumulator, and what the backward pass at hand has brought for it so far."""

    def __init__(self, name: str, module: nn.Module) -> None:
        self.names, self.modules = [name], {module}
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


def measured(layers: Sequence[Layer], measure: Callable[[Tensor], Tensor]) -> dict[str, float]:
    """A number from each layer's Fisher matrix, by the layer's name; all brought to the host together."""
    values = [measure(layer.fisher).to(layers[0].device) for layer in layers]
    return dict(zip((layer.name for layer in layers), torch.stack(values).tolist() if values else [], strict=True))


def find_layers(model: nn.Module, target_modules: str | Sequence[str] | None) -> list[Layer]:
    """One ``Layer`` for each weight of the selected nn.Linear and Conv1D modules, in the model's order."""
    modules = dict(_linear_modules(model))
    layers: dict[int, Layer] = {}
    for name in _selected(model, modules, target_modules):
        module = modules[name]
        # A weight that is computed anew whenever it is asked for (weight norm) is shared with no other module.
        key = id(module._parameters.get("weight", module))
        if key in layers:
            layers[key].names.append(name)
            layers[key].modules.add(module)
        else:
            layers[key] = Layer(name, module)
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
    are left out. A module that has several names comes with each."""
    paths = list(model.named_modules(remove_duplicate=False))
    wrappers = {path for path, module in paths if "base_layer" in module._modules}
    for path, module in paths:
        if isinstance(module, nn.Linear) or _is_conv1d(module):
            name = _unwrapped_name(path, wrappers)
            if name is not None:
                yield name, module


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


def _selected(model: nn.Module, modules: dict[str, nn.Module], target_modules: str | Sequence[str] | None) -> list[str]:
    """The names among ``modules`` that ``target_modules`` means; each of its entries must mean one."""
    if target_modules is None:
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        parts = set() if head is None else set(head.modules())
        matches = {None: {name for name, module in modules.items() if module not in parts}}
    elif isinstance(target_modules, str):
        matches = {target_modules: {name for name in modules if re.fullmatch(target_modules, name)}}
    else:
        matches = {t: {name for name in modules if f".{name}".endswith(f".{t}")} for t in target_modules}
    unmatched = [target for target, names in matches.items() if not names]
    if unmatched or not matches:
        raise ValueError(
            f"target_modules selects no nn.Linear or Conv1D of the model by {unmatched}, got {target_modules!r}; "
            f"there are {', '.join(modules) or 'none'}"
        )
    chosen = set().union(*matches.values())
    return [name for name in modules if name in chosen]


def _refuse_weights_shared_with_others(model: nn.Module, layers: dict[int, Layer]) -> None:
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            layer = layers.get(id(parameter))
            if layer is not None and module not in layer.modules:
                raise ValueError(
                    f"the weight of {layer.name} is also that of {name} ({type(module).__name__}), whose share of the "
                    "gradient would be missed: leave it out of target_modules, or select every module that has it"
                )
