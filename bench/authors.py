"""LoKU as the authors' public program runs it: what a user would otherwise pick.

Every sequence is padded to 500 tokens; forget and retain batch have a forward pass each, with logits of all tokens;
the hinge is `loku.formulations.authors_ihl`; importance comes from ``.grad`` of all weights, a micro-batch at a time,
and is summed on the host; factors come from ``torch.svd_lowrank`` without oversampling.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from peft import PeftModel
from torch import Tensor, nn

from loku.data import IGNORE_INDEX
from loku.fila.targets import base_weight, lora_layers
from loku.formulations import authors_ihl

LENGTH = 500
EPS = 1e-5


def add_importance(importance: dict[str, Tensor], model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Adds n_b g_b^2 of a micro-batch to ``importance``, by module name, on the host. Returns n_b, its labels.

    All weights of ``model`` must require gradients.
    """
    model(**batch, use_cache=False).loss.backward()
    count = (batch["labels"] != IGNORE_INDEX).sum()
    for name, parameter in model.named_parameters():
        module = name.removesuffix(".weight")
        if module in importance:
            importance[module] += (parameter.grad.pow(2) * count).detach().cpu()
        parameter.grad = None
    return count.cpu()


def importance_of(
    modules: Iterable[str], model: nn.Module, batches: Iterable[Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """sum_b n_b g_b^2 / sum_b n_b of the weights of ``modules``."""
    importance = {name: torch.zeros(model.get_submodule(name).weight.shape) for name in modules}
    counts = [add_importance(importance, model, batch) for batch in batches]
    return {name: value / sum(counts) for name, value in importance.items()}


@torch.no_grad()
def initialise(model: PeftModel, forget: Mapping[str, Tensor], retain: Mapping[str, Tensor]) -> None:
    """FILA from the importance of both sets; the residual is taken from the factors before they are rounded."""
    for name, layer in lora_layers(model, "default").items():
        weight, scaling = base_weight(layer), layer.scaling["default"]
        row_weight = (forget[name] / (EPS + retain[name])).sum(dim=1).sqrt().to(weight.device)
        U, S, V = torch.svd_lowrank(row_weight[:, None] * weight.float(), q=layer.r["default"])
        root = (S / scaling).sqrt()
        A, B = (V * root).T, U * root / (row_weight + EPS)[:, None]
        layer.lora_A["default"].weight.copy_(A)
        layer.lora_B["default"].weight.copy_(B)
        layer.get_base_layer().weight.sub_((scaling * B @ A).to(weight.dtype))


def loss(model: nn.Module, forget: Mapping[str, Tensor], retain: Mapping[str, Tensor]) -> Tensor:
    """IHL of the forget batch and cross-entropy of the retain batch, each a mean over its label tokens.

    Both have the logits of all tokens, padding included; the hinge drops those without a label before its copies.
    """
    inputs = {name: x for name, x in forget.items() if name != "labels"}
    logits = model(**inputs, use_cache=False).logits[:, :-1].flatten(0, 1)
    labels = forget["labels"][:, 1:].flatten()
    scored = labels != IGNORE_INDEX
    return authors_ihl(logits[scored], labels[scored]) + model(**retain, use_cache=False).loss


def training_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, forget: Mapping[str, Tensor], retain: Mapping[str, Tensor]
) -> None:
    """One optimiser step, with the gradients' norm held to 1, as the trainer's default is."""
    loss(model, forget, retain).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
