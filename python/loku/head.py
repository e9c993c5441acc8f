"""The hidden states that a causal language model's output head sees, without running the head.

While the model runs, its head returns a few probe numbers in place of logits. What the model makes of them tells what
it does to its logits after the head: nothing, a scale (Cohere, Granite), a soft cap (Gemma 2). So no model's forward is
copied, and what is not understood is refused rather than guessed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from loku.inference import evaluation_mode
from loku.sharding import is_sharded

# The two ends tell the slope at 0 and the cap; those between, whether scale and cap are all there is.
_SMALL, _LARGE = 2.0**-40, 2.0**40
_PROBE = (0.0, _SMALL, -_SMALL, 1.0, -3.0, 10.0, -30.0, 100.0, -300.0, _LARGE, -_LARGE)
_TOLERANCE = 1e-5  # the model may pass its logits on in float32


class HeadRefused(Exception):
    """The head's hidden states cannot stand for the logits; the message says why."""


@dataclass(frozen=True)
class OutputHead:
    """logits = softcap * tanh(scale * (weight @ hidden + bias) / softcap), or scale * (...) without a soft cap.

    ``weight`` (V, D) and ``bias`` (V,) are the model's own parameters. ``autocast`` is the dtype of the autocast that
    the head ran under, None for no autocast; what is computed of the head later must run under it too.
    """

    weight: Tensor
    bias: Tensor | None
    scale: float
    softcap: float | None
    autocast: torch.dtype | None

    def autocasting(self) -> torch.autocast:
        return torch.autocast(self.weight.device.type, dtype=self.autocast, enabled=self.autocast is not None)

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., V), in float32 at least, of hidden states (..., D)."""
        with self.autocasting():
            logits = linear(hidden, self.weight, self.bias)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel or DeepSpeed's engine, or the model itself."""
    is_engine = hasattr(model, "zero_optimization_stage")
    return model.module if is_engine or isinstance(model, DistributedDataParallel) else model


def run(model: nn.Module, inputs: Mapping[str, Any]) -> Any:
    """The model's outputs, without a cache of keys and values unless ``inputs`` ask for it."""
    has_cache = hasattr(getattr(unwrapped(model), "config", None), "use_cache")
    return model(**{**({"use_cache": False} if has_cache else {}), **inputs})


def hidden_states(model: nn.Module, inputs: Mapping[str, Any]) -> tuple[Tensor, OutputHead]:
    """One forward pass: the hidden states (rows, length, D) before the head, and the head.

    Raises:
        HeadRefused: the head is not one plain linear layer held whole by this process, or the model makes something
            else of its logits than a scale and a soft cap.
    """
    head = _find_head(model)
    with _probing(head) as calls:
        probed = run(model, inputs).logits
    tokens = inputs["input_ids"] if "input_ids" in inputs else inputs["inputs_embeds"][..., 0]
    if len(calls) != 1 or calls[0][0].shape[:-1] != tokens.shape:
        raise HeadRefused("the head is not called once with the hidden states of all tokens")
    hidden, autocast = calls[0]
    return hidden, OutputHead(head.weight, head.bias, *_transform(probed), autocast)


def check_hidden_states(model: nn.Module) -> None:
    """Compares, on four tokens, the logits that `hidden_states` stands for with the model's own.

    Raises:
        HeadRefused: as `hidden_states` does; or the logits differ by more than rounding.
    """
    inputs = {"input_ids": torch.arange(4, device=next(model.parameters()).device)[None]}
    with evaluation_mode(model):
        hidden, head = hidden_states(model, inputs)
        ours, own = head.logits(hidden), run(model, inputs).logits
    tolerance = 16 * torch.finfo(own.dtype if head.autocast is None else head.autocast).eps
    if ours.shape != own.shape or not bool((ours - own).abs().max() <= tolerance * own.abs().max()):
        raise HeadRefused("the head's product is not the model's logits")


def head_refusal(model: nn.Module) -> str | None:
    """Why the hidden states cannot stand for the model's logits, as `check_hidden_states` finds; None if they can."""
    try:
        check_hidden_states(model)
    except torch.OutOfMemoryError:
        raise
    except (HeadRefused, TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
        return str(error) or type(error).__name__
    return None


def _find_head(model: nn.Module) -> nn.Linear:
    if isinstance(model, DistributedDataParallel) and (model.find_unused_parameters or model.static_graph):
        # It searches the outputs' graph for parameters, and those outputs are the probe, which has no graph.
        raise HeadRefused("DistributedDataParallel searches the outputs for unused parameters")
    model = unwrapped(model)
    if not isinstance(model, (PreTrainedModel, PeftModel)):
        raise HeadRefused(f"{type(model).__name__} may hold its parameters in parts")  # FSDP 1
    if any(module._compiled_call_impl is not None for module in model.modules()):
        raise HeadRefused("the model is compiled")
    head = (model.get_base_model() if isinstance(model, PeftModel) else model).get_output_embeddings()
    if isinstance(head, ModulesToSaveWrapper):
        trained = not head.disable_adapters and head.active_adapters[0] in head.modules_to_save
        head = head.modules_to_save[head.active_adapters[0]] if trained else head.original_module
    if type(head) is not nn.Linear:
        raise HeadRefused(f"the head is {type(head).__name__}, not a plain nn.Linear")
    weight = head.weight
    if is_sharded(weight) or weight.shape != (head.out_features, head.in_features):
        raise HeadRefused("the head's weight is sharded")
    if "forward" in vars(head) or head._forward_hooks or head._forward_pre_hooks:
        raise HeadRefused("the head's forward is hooked")  # offloading, for one
    return head


@contextmanager
def _probing(head: nn.Linear) -> Iterator[list[tuple[Tensor, torch.dtype | None]]]:
    """Lets the head return the probe; gives what it is called with, and the dtype of autocast, call by call."""
    calls = []

    def forward(hidden: Tensor) -> Tensor:
        kind = hidden.device.type
        calls.append((hidden, torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None))
        probe = torch.tensor(_PROBE, dtype=torch.float64, device=hidden.device)
        return probe.repeat(*hidden.shape[:-1], 1)

    head.forward = forward
    try:
        yield calls
    finally:
        del head.forward


def _transform(probed: Tensor) -> tuple[float, float | None]:
    """Scale and soft cap by which the probe (rows, length, probes) became what it is."""
    if probed.shape[-1] != len(_PROBE) or probed.dtype not in (torch.float32, torch.float64):
        raise HeadRefused(f"the model made {probed.dtype} of shape {tuple(probed.shape)} of {len(_PROBE)} logits")
    values = probed.detach().reshape(-1, len(_PROBE)).double()
    lowest, highest = torch.stack([values.amin(dim=0), values.amax(dim=0)]).cpu()
    probe = torch.tensor(_PROBE, dtype=torch.float64)
    scale, cap = float(highest[_PROBE.index(_SMALL)] / _SMALL), float(highest[_PROBE.index(_LARGE)].abs())

    def explains(expected: Tensor) -> bool:
        return all(bool(((found - expected).abs() <= _TOLERANCE * expected.abs()).all()) for found in (lowest, highest))

    if scale != 0 and explains(scale * probe):
        return scale, None
    if scale != 0 and cap > 0 and explains(cap * torch.tanh(scale * probe / cap)):
        return scale, cap
    raise HeadRefused("what the model does to its logits is neither a scale nor a soft cap")
