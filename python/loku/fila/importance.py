"""The importance pass: Fisher information of both data sets, summed to one weight a row."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.tuners_utils import check_target_module_exists
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from loku.fila.checkpoint import ImportanceCheckpoint
from loku.fila.config import FilaConfig
from loku.fila.fingerprint import fingerprint
from loku.fila.progress import progress
from loku.fila.relative_importance import row_weights
from loku.fila.state import FilaStateDict
from loku.fila.targets import check_whole, lora_layers
from loku.head import HeadRefused, head_refusal, hidden_states
from loku.inference import adapter_off, without_dropout
from loku_kernels import fused_linear_cross_entropy
from loku_kernels.fisher_accumulator import FisherAccumulator, NoLabelsError, sum_of_token_losses


def get_fila_state_dict(
    model: nn.Module,
    forget_dataloader: Iterable[Mapping],
    retain_dataloader: Iterable[Mapping],
    config: FilaConfig | None = None,
    *,
    peft_config: LoraConfig | None = None,
    adapter_name: str = "default",
    show_progress_bar: bool = True,
    checkpoint: ImportanceCheckpoint | None = None,
) -> FilaStateDict:
    """Row weights d_i = sqrt(sum_j F_f / (eps + F_r)) of each module that an adapter adapts: FILA's expensive part.

    F_f and F_r are the diagonal Fisher information of the base model (adapters disabled, no dropout) on the forget and
    the retain data, as `loku_kernels.FisherAccumulator` defines it. Of their ratio only the sums over columns are
    kept, a vector a module, which `FilaStateDict.save` caches.

    Args:
        model: a PeftModel with the adapter, or a plain model with ``peft_config``, whose target_modules then must be
            names or a pattern (neither None nor "all-linear").
        forget_dataloader, retain_dataloader: batches as the model takes them, with ``labels``, padded or packed;
            they are moved to the model's device. Gone through once a group of modules, so an iterator allows one
            group only.
        checkpoint: files from which a pass that was broken off goes on, if it is called again with equal batches in the
            same order. The caller removes them.

    Raises:
        ValueError: the target modules cannot be told; batches lack labels; a data set is empty, or all its labels are
            ignored; an iterator would have to be gone through twice; memory_budget is too small for one module; a
            module's Fisher information is zero throughout on either data set, which is to say that the data never
            reached it; the checkpoint belongs to another model, other data or settings, or is cut short.
        FloatingPointError: NaN or infinite gradients, with the module's name.

    Memory: two float32 matrices of each module's shape, within ``config.memory_budget`` by groups of modules.
    """
    config = config or FilaConfig()
    modules = _target_modules(model, peft_config, adapter_name)
    state = FilaStateDict(
        fingerprints={name: fingerprint(module.weight) for name, module in modules.items()},
        importance={"eps": config.eps, "eps_mode": config.eps_mode, "granularity": config.granularity},
    )
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    device = next(base.parameters()).device
    data = {"forget": forget_dataloader, "retain": retain_dataloader}
    names = "|".join(map(re.escape, modules))
    settings = {"memory_budget": config.memory_budget, "loss": _loss_of(base)}
    accumulators = {which: FisherAccumulator(base, names, config.granularity, **settings) for which in data}
    passes = accumulators["forget"].passes
    _check_passes(data, passes, config.memory_budget)
    as_base_model = adapter_off(model) if isinstance(model, PeftModel) else nullcontext()
    if checkpoint is not None:
        checkpoint.load_finished(state)
    with as_base_model, without_dropout(model), accumulators["forget"] as forget, accumulators["retain"] as retain:
        for number, (group, _) in enumerate(zip(forget.groups(), retain.groups(), strict=True), start=1):
            if all(name in state for name in group):
                continue
            done = dict.fromkeys(data, 0) if checkpoint is None else checkpoint.load_sums(state, group, accumulators)
            for which, batches in data.items():
                what = f"{which} importance" + (f", pass {number} of {passes}" if passes > 1 else "")
                bar = progress(batches, what, "batch", show_progress_bar, modules=len(group))
                for count in _accumulate(accumulators[which], bar, which, device, done[which]):
                    done[which] = count
                    if checkpoint is not None:
                        checkpoint.keep_sums(state, group, accumulators, done)
            state.update(_row_weights(modules, _fisher(forget, "forget"), _fisher(retain, "retain"), config))
            if checkpoint is not None:
                checkpoint.finish_group(state)
    return state


def _loss_of(base: nn.Module) -> Callable[[nn.Module, Mapping, Tensor], Tensor]:
    """The tokens' summed loss, with logits of scored tokens only, a chunk at a time, where the head allows it."""
    return sum_of_token_losses if head_refusal(base) is not None else _loss_from_hidden_states


def _loss_from_hidden_states(base: nn.Module, inputs: Mapping, targets: Tensor) -> Tensor:
    try:
        hidden, head = hidden_states(base, inputs)
    except HeadRefused:  # the head is a target: it must be seen at work
        return sum_of_token_losses(base, inputs, targets)
    transform = {"bias": head.bias, "logit_scale": head.scale, "logit_softcap": head.softcap}
    scored = (targets.flatten() >= 0).nonzero().squeeze(1)
    with head.autocasting():
        return fused_linear_cross_entropy(hidden, head.weight, targets, rows=scored, reduction="sum", **transform)


def _accumulate(
    accumulator: FisherAccumulator, batches: Iterable[Mapping], which: str, device: torch.device, done: int
) -> Iterator[int]:
    """Takes in all batches but the first ``done``, and yields after each how many are in."""
    count = 0
    for count, batch in enumerate(batches, start=1):
        if count <= done:
            continue
        if "labels" not in batch:
            raise ValueError(f"the batches of {which}_dataloader must have labels, got {sorted(batch)}")
        accumulator.update({key: x.to(device) if isinstance(x, Tensor) else x for key, x in batch.items()})
        yield count
    if count == 0:
        raise ValueError(f"{which}_dataloader has no batches")


def _fisher(accumulator: FisherAccumulator, which: str) -> dict[str, Tensor]:
    try:
        return accumulator.fisher
    except NoLabelsError as error:
        raise ValueError(f"all labels in the batches of {which}_dataloader are ignored") from error


def _row_weights(
    modules: Mapping[str, nn.Module], forget: Mapping[str, Tensor], retain: Mapping[str, Tensor], config: FilaConfig
) -> dict[str, Tensor]:
    """A group's; nothing else holds its Fisher matrices when the next group's are made."""
    weights = {}
    for name, module in modules.items():
        if name in forget:
            fisher = (_rows_are_outputs(module, f[name]) for f in (forget, retain))
            weights[name] = row_weights(*fisher, config.eps, config.eps_mode, name)
    return weights


def _rows_are_outputs(module: nn.Module, fisher: Tensor) -> Tensor:
    return fisher.T if isinstance(module, Conv1D) else fisher


def _check_passes(data: Mapping[str, Iterable], passes: int, budget: int | None) -> None:
    for which, batches in data.items():
        if passes > 1 and iter(batches) is batches:
            raise ValueError(
                f"{which}_dataloader is an iterator, which can be gone through once, but memory_budget = {budget} "
                f"takes {passes} passes; give a DataLoader or a list"
            )


def _target_modules(model: nn.Module, peft_config: LoraConfig | None, adapter_name: str) -> dict[str, nn.Module]:
    """Module name in the base model -> linear layer (inside of its LoRA layer, if there is one)."""
    if isinstance(model, PeftModel):
        layers = lora_layers(model, adapter_name)
        check_whole(layers)
        return {name: layer.get_base_layer() for name, layer in layers.items()}
    if peft_config is None or peft_config.target_modules in (None, "all-linear"):
        raise ValueError(
            "model must be a PeftModel, or peft_config must name its target_modules, got "
            f"{type(model).__name__} and {peft_config and peft_config.target_modules!r}"
        )
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    modules = {name: module for name, module in linear.items() if check_target_module_exists(peft_config, name)}
    if not modules:
        raise ValueError(f"no linear layer of the model matches target_modules = {peft_config.target_modules!r}")
    return modules
