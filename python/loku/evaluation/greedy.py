"""What a model would say next, greedily: known tokens in one pass, and freely from the caches of that pass."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from loku.head import hidden_states, run
from loku.inference import context_length, evaluation_mode, tokens_at_once
from loku.training.scores import Scorer
from loku_kernels import fused_cross_entropy, fused_linear_cross_entropy

KeyValues = list[tuple[Tensor, Tensor]]
"""Of each layer, keys and values (sequences, heads, tokens, head size)."""


def check_input_ids(model: nn.Module, input_ids: Tensor, least: int) -> None:
    """Raises ValueError unless input_ids is (N, T) integers with N > 0 and least <= T <= the model's context."""
    if not isinstance(input_ids, Tensor) or input_ids.ndim != 2 or input_ids.is_floating_point():
        shape = tuple(input_ids.shape) if isinstance(input_ids, Tensor) else None
        given = f"{input_ids.dtype} of shape {shape}" if shape is not None else type(input_ids).__name__
        raise ValueError(f"input_ids must be a tensor of integers (sequences, tokens), got {given}")
    if len(input_ids) == 0 or input_ids.shape[1] < least:
        raise ValueError(f"input_ids must have a sequence, and at least {least} tokens in each, got {input_ids.shape}")
    context = context_length(model)
    if context is not None and input_ids.shape[1] > context:
        raise ValueError(f"input_ids has {input_ids.shape[1]} tokens a sequence, the model's context is {context}")


class GreedyReader:
    """The likeliest token after each token that a model reads, the lowest on ties.

    From hidden states where the model's head can be taken over (see `loku.head`), else from its logits: in
    either case by one sweep of the fused kernels, which on a CPU takes a fraction of the time of argmax.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.from_hidden = Scorer(model).refusal is None

    def predictions(self, input_ids: Tensor) -> Tensor:
        """(N, T - 1): of tokens 2..T, each after those before it."""
        return torch.cat([self._read(part, part[:, 1:]) for part in self._parts(input_ids)])

    def predictions_and_cache(self, input_ids: Tensor) -> tuple[Tensor, KeyValues]:
        """As `predictions`, with the keys and values of all T tokens.

        Raises:
            ValueError: the model keeps no such cache for every layer.
        """
        predicted, caches = [], []
        for part in self._parts(input_ids):
            cache = DynamicCache()  # without a config even layers with a sliding window keep every token
            predicted.append(self._read(part, part[:, 1:], cache))
            caches.append(cache)
        for layer in caches[0].layers or [None]:
            if getattr(layer, "keys", None) is None or layer.keys.shape[-2] != input_ids.shape[1]:
                raise ValueError(f"model ({type(self.model).__name__}) keeps no cache of all tokens' keys and values")
        layers = zip(*(cache.layers for cache in caches), strict=True)
        merged = [
            tuple(torch.cat([getattr(x, name) for x in layer]) for name in ("keys", "values")) for layer in layers
        ]
        return torch.cat(predicted), merged

    def continuations(self, tokens: Tensor, known: Tensor, cache: KeyValues, sequences: Tensor, start: int) -> Tensor:
        """(R, T): tokens with those from position known[r] on replaced, each by the likeliest after those before it.

        Args:
            tokens: (R, T); row r holds its first known[r] tokens, and anything after them.
            known: (R,), each greater than ``start``.
            cache: of whole sequences; row r begins with the first ``start`` tokens of sequence ``sequences[r]``.

        All rows step through the positions together, those whose next token is known taking what they know, so that
        there is no padding and every row attends to exactly what it would alone.
        """
        tokens, length = tokens.clone(), tokens.shape[1]
        state = Cache(layers=[_GrowingLayer(*(x[sequences, :, :start] for x in pair), length) for pair in cache])
        for position in range(start, length - 1):
            following = tokens[:, position + 1 : position + 2]
            likeliest = self._read(tokens[:, position : position + 1], following, state)
            following.copy_(torch.where((known > position + 1)[:, None], following, likeliest))
        return tokens

    def _read(self, input_ids: Tensor, expected: Tensor, cache: Cache | None = None) -> Tensor:
        """The likeliest token after each of the first input_ids, as many as ``expected`` has, which it may well be."""
        inputs = {"input_ids": input_ids} | ({} if cache is None else {"past_key_values": cache, "use_cache": True})
        options = {"reduction": "none", "return_statistics": True}
        if self.from_hidden:
            hidden, head = hidden_states(self.model, inputs)
            options |= {"bias": head.bias, "logit_scale": head.scale, "logit_softcap": head.softcap}
            with head.autocasting():
                _, row = fused_linear_cross_entropy(hidden[:, : expected.shape[1]], head.weight, expected, **options)
        else:
            _, row = fused_cross_entropy(run(self.model, inputs).logits[:, : expected.shape[1]], expected, **options)
        return torch.where(row.correct, expected, row.runner_up_index)

    def _parts(self, input_ids: Tensor) -> tuple[Tensor, ...]:
        tokens = tokens_at_once(self.model, holds_logits=not self.from_hidden)
        return input_ids.split(max(1, tokens // input_ids.shape[1]))


def check_cache(model: nn.Module) -> None:
    """Raises ValueError unless every layer of the model keeps all tokens' keys and values; asks it with four tokens."""
    try:
        with evaluation_mode(model) as device:
            GreedyReader(model).predictions_and_cache(torch.arange(4, device=device)[None])
    except IndexError as error:  # of models with layers of another kind
        raise ValueError(f"model ({type(model).__name__}) keeps no keys and values in some of its layers") from error


def cache_bytes(cache: KeyValues) -> int:
    """Of all layers and sequences."""
    return sum(x.nbytes for pair in cache for x in pair)


class _GrowingLayer(DynamicLayer):
    """A layer's cache with room for all tokens from the start: appending a token does not copy those before it."""

    def __init__(self, keys: Tensor, values: Tensor, room: int) -> None:
        super().__init__()
        self._keys, self._values = (x.new_empty(*x.shape[:2], room, x.shape[3]) for x in (keys, values))
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
        self.keys, self.values = self._keys[:, :, :0], self._values[:, :, :0]
        self.update(keys, values)

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        start = self.keys.shape[-2]
        end = start + key_states.shape[-2]
        self._keys[:, :, start:end] = key_states
        self._values[:, :, start:end] = value_states
        self.keys, self.values = self._keys[:, :, :end], self._values[:, :, :end]
        return self.keys, self.values
