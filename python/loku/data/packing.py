"""Whether a model keeps the sequences of a packed row apart."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from loku.data.collate import LanguageModelCollator
from loku.inference import evaluation_mode

_TOKENS = 4  # of each sequence: few, so that models with a short context can be asked
# What models raise for position_ids that they do not take, have no entry for, check themselves, or cannot compute with.
_REFUSALS = (TypeError, IndexError, ValueError, RuntimeError)


def packing_is_exact(model: nn.Module) -> bool:
    """Whether the batches of a packing collator give each sequence the logits that it has alone. Measured.

    The model, in evaluation mode and with ``use_cache=False``, is called with two rows of two sequences. The second
    sequence of a row must not change with the first one's tokens by more than 1e-3, nor differ from itself alone by
    more than a tenth, of what they would in a row that is not packed: the first shows what attention lets through, the
    second that positions begin anew, within the rounding of 16-bit models. A model that refuses ``position_ids``, or
    fails otherwise than by running out of memory, is not exact.

    Call it before the model is wrapped for several processes. Random numbers of torch's generators are not consumed.
    """
    try:
        with evaluation_mode(model):
            return _measure(model)
    except torch.OutOfMemoryError:
        raise
    except _REFUSALS:
        return False


def _measure(model: nn.Module) -> bool:
    weight = model.get_input_embeddings().weight  # of adapters too, which have no num_embeddings
    generator = torch.Generator().manual_seed(0)
    first, other, second = torch.randint(len(weight), (3, 2, _TOKENS), generator=generator).tolist()

    def second_logits(before: list[list[int]], packed: bool) -> Tensor:
        """(2, tokens, vocabulary) of ``second``, after ``before`` in its row."""
        if packed:
            sequences = [tokens for pair in zip(before, second, strict=True) for tokens in pair]
            batch = LanguageModelCollator(row_tokens=2 * _TOKENS)([{"input_ids": s, "labels": s} for s in sequences])
            inputs = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"]}
        else:
            inputs = {"input_ids": torch.tensor([b + s for b, s in zip(before, second, strict=True)])}
        return _logits(model, inputs, weight.device)[:, -_TOKENS:]

    alone = second_logits([[], []], packed=False)
    packed = second_logits(first, packed=True)
    joined = second_logits(first, packed=False)
    leak = (second_logits(other, packed=True) - packed).norm()
    leak_unpacked = (second_logits(other, packed=False) - joined).norm()
    return bool(leak <= 1e-3 * leak_unpacked) and bool((packed - alone).norm() <= 0.1 * (joined - alone).norm())


def _logits(model: nn.Module, inputs: dict[str, Tensor], device: torch.device) -> Tensor:
    options = {"use_cache": False} if hasattr(getattr(model, "config", None), "use_cache") else {}
    return model(**{name: tensor.to(device) for name, tensor in inputs.items()}, **options).logits.double()
