"""Running a model without training it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft import PeftModel
from torch import nn


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode inside; each module's ``training`` is as it was afterwards."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, was in training.items():
            module.training = was


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[torch.device]:
    """Neither dropout nor gradients inside. Yields the model's device."""
    with without_dropout(model), torch.no_grad():
        yield next(model.parameters()).device


@contextmanager
def adapter_off(model: PeftModel) -> Iterator[None]:
    """The base model inside. PEFT makes all adapter weights trainable afterwards, so that is put back too."""
    trainable = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        with model.disable_adapter():
            yield
    finally:
        for parameter, was in trainable.items():
            parameter.requires_grad_(was)


def context_length(model: nn.Module) -> int | None:
    """Most tokens that the model takes, or None where its config does not say."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def tokens_at_once(model: nn.Module, holds_logits: bool) -> int:
    """Tokens of a batch: 4096, or as many as have 256 MiB of float32 logits where those are held."""
    fitting = (256 << 20) // (4 * model.config.get_text_config().vocab_size) if holds_logits else 4096
    return max(1, min(4096, fitting))
