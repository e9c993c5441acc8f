"""FILA on a PeftModel, in the manner of PEFT's own data-driven initialisations."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from itertools import chain

import torch
from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor

from loku.fila.config import FilaConfig
from loku.fila.factors import Factors, fila_factors
from loku.fila.fingerprint import check_fingerprints, fingerprint
from loku.fila.importance import get_fila_state_dict
from loku.fila.progress import progress
from loku.fila.residual import subtract_initial
from loku.fila.shadow import ShadowVariant
from loku.fila.state import FilaStateDict
from loku.fila.stored_form import FilaLoraConfig, keep_initial, leave_base_out
from loku.fila.targets import base_weight, check_fresh, check_ranks, check_residual, check_whole, lora_layers

# An H200's host of 16 cores, milliseconds a matrix of Llama2-7B, rank 32, with 1, 2, 4, 6 and 8: 82, 41, 26, 25, 26.
GPU_WORKERS = 4


def initialize_lora_fila_weights(
    model: PeftModel,
    fila_state_dict: Mapping[str, Tensor] | None = None,
    *,
    forget_dataloader: Iterable | None = None,
    retain_dataloader: Iterable | None = None,
    config: FilaConfig | None = None,
    adapter_name: str = "default",
    show_progress_bar: bool = True,
) -> None:
    """Starts the adapter's LoRA weights from A* = sqrt(S/s) V^T and B* = diag(1/d) U sqrt(S/s), in place.

    U S V^T is the best rank-r approximation of diag(d) W and d the row weights of ``fila_state_dict``; s is the
    adapter's scaling. The base becomes W - s B* A* from the factors in the adapter's dtype (mode "residual"), or
    each forward subtracts s B* A* x (mode "shadow"), so that the model computes at step 0 what the base model does.
    Nothing is changed before all factors are at hand.

    From then on the adapter is stored, by whatever stores it (`save_fila_adapter`, ``model.save_pretrained``, a
    trainer's checkpoint), as one of rank 2r that ``PeftModel.from_pretrained`` loads on the unmodified base model. A
    trainer resumes from such a checkpoint if the model was built in the same way before; the initial factors are
    compared, and a checkpoint trained over another residual base is refused.

    In mode "residual" the base model inside ``model`` is not the base model any more: saving it alone gives
    W - s B* A*, and so does deleting the adapter, after which the model refuses to run. `save_merged`,
    ``model.merge_and_unload()``, ``model.unload()``, ``model.disable_adapter()``, other adapters beside this one and
    batches that mix them are right in both modes.

    Args:
        model: with a newly made LoRA adapter on linear layers (nn.Linear, Conv1D; in mode "shadow" quantised ones too).
            rank_pattern, alpha_pattern, use_rslora and lora_bias are honoured.
        fila_state_dict: module name in the base model -> row weights (out,), see `get_fila_state_dict`. Modules that
            the adapter does not have are ignored.
        forget_dataloader, retain_dataloader: to compute it from, where it is not given.
        config: `FilaConfig()` by default.
        adapter_name: of the adapter to start.

    Raises:
        TypeError: model is no PeftModel.
        ValueError: the adapter is not plain, new LoRA on linear layers; its rank exceeds min(out, in); the row
            weights lack a module, do not fit its shape, or belong to another base model; in mode "residual" also
            where the weight is quantised or tied, or other adapters use it.
    """
    config = config or FilaConfig()
    layers = lora_layers(model, adapter_name)
    check_whole(layers)
    check_fresh(model, layers, adapter_name)
    check_ranks(layers, adapter_name)
    if config.mode == "residual":
        check_residual(model, layers, adapter_name)
    if fila_state_dict is None:
        if forget_dataloader is None or retain_dataloader is None:
            raise ValueError(
                "fila_state_dict is required, or forget_dataloader and retain_dataloader to compute it from"
            )
        fila_state_dict = get_fila_state_dict(
            model,
            forget_dataloader,
            retain_dataloader,
            config,
            adapter_name=adapter_name,
            show_progress_bar=show_progress_bar,
        )
    _check_state(fila_state_dict, layers)
    factors = _all_factors(layers, adapter_name, fila_state_dict, config.rtol, show_progress_bar)
    _warn_of_dead_directions(factors)
    importance = getattr(fila_state_dict, "importance", {})
    attach(model, layers, adapter_name, factors, config, importance)


@torch.no_grad()
def attach(
    model: PeftModel,
    layers: Mapping[str, LoraLayer],
    adapter_name: str,
    initial: Mapping[str, Factors],
    config: FilaConfig,
    importance: Mapping[str, object],
) -> None:
    """Starts the adapter from the given factors and takes them out of the base, or out of its forward."""
    fingerprints = {name: fingerprint(layer.get_base_layer().weight) for name, layer in layers.items()}
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    for name, layer in layers.items():
        a, b = layer.lora_A[adapter_name], layer.lora_B[adapter_name]
        a.weight.copy_(initial[name].A)
        b.weight.copy_(initial[name].B)
        if b.bias is not None:
            b.bias.zero_()
        keep_initial(layer, adapter_name, initial[name])
        if config.mode == "residual":
            subtract_initial(layer, adapter_name, initial[name], config.residual_dtype)
            if layer is head:
                leave_base_out(layer)
        else:
            layer.lora_variant[adapter_name] = ShadowVariant()
    settings = {**dataclasses.asdict(config), "residual_dtype": config.residual_dtype and str(config.residual_dtype)}
    record = {"config": settings, "importance": dict(importance), "fingerprints": fingerprints}
    model.peft_config[adapter_name] = FilaLoraConfig.of(model.peft_config[adapter_name], record)


def _all_factors(
    layers: Mapping[str, LoraLayer],
    adapter_name: str,
    row_weights: Mapping[str, Tensor],
    rtol: float,
    show_progress_bar: bool,
) -> dict[str, Factors]:
    """Of every layer, several at a time on a GPU: a weighted SVD waits for the host's eigenvalues at every step."""

    def of(name: str) -> Factors:
        return _factors(name, layers[name], adapter_name, row_weights[name], rtol)

    first, *others = layers
    on_gpu = all(layer.get_base_layer().weight.is_cuda for layer in layers.values())
    with ThreadPoolExecutor(GPU_WORKERS) as pool, _one_thread() if on_gpu else nullcontext():
        # Torch loads its linear algebra for GPUs in the first call, and fails where several threads make it.
        beginning = of(first)
        found = chain([beginning], pool.map(of, others) if on_gpu else map(of, others))
        pairs = zip(layers, found, strict=True)
        return dict(progress(pairs, "weighted SVD", "module", show_progress_bar, total=len(layers)))


@contextmanager
def _one_thread() -> Iterator[None]:
    """An eigenproblem of a few hundred rows is as fast on one core, and leaves the others to other matrices."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _factors(name: str, layer: LoraLayer, adapter_name: str, row_weight: Tensor, rtol: float) -> Factors:
    weight = base_weight(layer)
    dtype = layer.lora_A[adapter_name].weight.dtype
    try:
        return fila_factors(weight, row_weight, layer.r[adapter_name], layer.scaling[adapter_name], dtype, rtol)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name}: {error}") from error


def _check_state(state: Mapping[str, Tensor], layers: Mapping[str, LoraLayer]) -> None:
    missing = [name for name in layers if name not in state]
    if missing:
        raise ValueError(
            f"fila_state_dict has no row weights for {', '.join(missing[:3])} ({len(missing)} of {len(layers)} modules)"
        )
    for name, layer in layers.items():
        if state[name].shape != (layer.out_features,):
            raise ValueError(
                f"fila_state_dict[{name!r}] must have the shape ({layer.out_features},), got {tuple(state[name].shape)}"
            )
    if isinstance(state, FilaStateDict):
        weights = {name: layer.get_base_layer().weight for name, layer in layers.items()}
        check_fingerprints(state.fingerprints, weights, "fila_state_dict")


def _warn_of_dead_directions(factors: Mapping[str, Factors]) -> None:
    dead = [name for name, (A, _) in factors.items() if not bool(A.any(dim=1).all())]
    if dead:
        warnings.warn(
            f"The weighted matrix of {', '.join(dead[:3])} ({len(dead)} modules) has a lower rank than its adapter, "
            "whose surplus directions start at zero and stay there; lower the rank in rank_pattern",
            stacklevel=3,
        )
