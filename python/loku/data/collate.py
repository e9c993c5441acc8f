"""Sequences of different lengths in one batch: packed, or padded to the longest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loku.data.examples import IGNORE_INDEX, Example, without_padding
from loku.data.roles import Role
from loku_kernels.sequences import next_token_labels, sequence_offsets

MODEL_INPUTS = ("input_ids", "attention_mask", "position_ids")


@dataclass(frozen=True)
class LanguageModelCollator:
    """Examples to ``input_ids`` and ``labels``, each (rows, length) int64, and what keeps the sequences apart.

    Padded (row_tokens None): a row for each sequence, padded on the right to the longest, with ``attention_mask``.
    Packed: each sequence goes to the first row with room for it, and ``position_ids`` begin at 0 with each sequence,
    and again with the padding at a row's end. There is no attention_mask then: the model must tell the sequences apart
    by their positions, which `packing_is_exact` finds out, and it must be called with ``use_cache=False``.

    Args:
        pad_token_id: any token of the vocabulary, which is neither scored nor attended to; the batch's first token if
            None. A tokenizer's own token for padding need not be one of the model's, and some models' backward pass
            divides zero by zero where nothing but a token of zeros is seen.
        row_tokens: most tokens in a row. Positions begin anew, so it may exceed the model's context.

    Raises:
        ValueError: on the call, if there are no examples, one is empty, has not as many labels as tokens, or is longer
            than row_tokens.
    """

    pad_token_id: int | None = None
    row_tokens: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.pad_token_id, int | None):
            raise ValueError(
                "pad_token_id must be a token id (the end-of-sequence token's, say), or None for the batch's first, "
                f"got {self.pad_token_id!r}"
            )
        if self.row_tokens is not None and self.row_tokens < 1:
            raise ValueError(f"row_tokens must be positive or None, got {self.row_tokens}")

    def __call__(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        return self.arrange(examples)[0]

    def arrange(self, examples: Sequence[Example]) -> tuple[dict[str, Tensor], Tensor]:
        """The batch, and the number (rows, length) of the sequence at each position, -1 at padding."""
        examples = [without_padding(example) for example in examples]
        lengths = _lengths(examples)
        rows = [[s] for s in range(len(examples))] if self.row_tokens is None else first_fit(lengths, self.row_tokens)
        shape = len(rows), max(sum(lengths[s] for s in row) for row in rows)
        pad = int(examples[0]["input_ids"][0]) if self.pad_token_id is None else self.pad_token_id
        input_ids, labels = torch.full(shape, pad), torch.full(shape, IGNORE_INDEX)
        position_ids, numbers = torch.zeros(shape, dtype=torch.int64), torch.full(shape, -1)
        for r, row in enumerate(rows):
            start = 0
            for s in row:
                place = r, slice(start, start + lengths[s])
                input_ids[place] = torch.as_tensor(examples[s]["input_ids"])
                labels[place] = torch.as_tensor(examples[s]["labels"])
                position_ids[place] = torch.arange(lengths[s])
                numbers[place] = s
                start += lengths[s]
            # Padding needs no positions beyond those that sequences have: the model may have no more.
            position_ids[r, start:] = torch.arange(shape[1] - start) % max(lengths)
        batch = {"input_ids": input_ids, "labels": labels}
        if self.row_tokens is None:
            batch["attention_mask"] = (numbers >= 0).long()
        else:
            batch["position_ids"] = position_ids
        return batch, numbers


@dataclass(frozen=True)
class UnlearningCollator:
    """Items {Role: Example} of `PairedDataset` to one batch for one forward pass.

    What `LanguageModelCollator` gives for all sequences, which are numbered FORGET first, then RETAIN, then PREFERRED,
    in the order of the items, wherever they lie in the rows. Besides, with S sequences and K scored tokens:

    - ``roles`` (S,) int64: the role of each sequence.
    - ``rows`` (K,) int64, increasing: positions, counted through the flattened (rows, length), whose next token of the
      same sequence has a label.
    - ``targets`` (K,) int64: those labels.
    - ``row_sequences`` (K,) int64: the number of the sequence.
    - ``tokens`` (1,) int64: how many there are without padding, of which packed rows have no mask.

    `MODEL_INPUTS` names what of it a model is called with.

    Raises:
        ValueError: on the call, as `LanguageModelCollator` does, or if an item is something else, or a sequence has no
            token to score.
    """

    pad_token_id: int | None = None
    row_tokens: int | None = None

    def __post_init__(self) -> None:
        LanguageModelCollator(self.pad_token_id, self.row_tokens)

    def __call__(self, items: Sequence[Mapping[Role, Example]]) -> dict[str, Tensor]:
        sequences = sequences_of(items)
        collator = LanguageModelCollator(self.pad_token_id, self.row_tokens)
        batch, numbers = collator.arrange([example for _, example in sequences])
        targets = next_token_labels(batch["labels"], sequence_offsets(batch), IGNORE_INDEX).flatten()
        rows = (targets != IGNORE_INDEX).nonzero().squeeze(1)
        row_sequences = numbers.flatten()[rows]
        for s in set(range(len(sequences))).difference(row_sequences.tolist()):
            raise ValueError(
                f"sequence {s} ({sequences[s][0].name.lower()}) has no token to score: no label after its first"
            )
        roles = torch.tensor([role for role, _ in sequences])
        scored = {"rows": rows, "targets": targets[rows], "row_sequences": row_sequences}
        return {**batch, "roles": roles, **scored, "tokens": (numbers >= 0).sum().reshape(1)}


def sequences_of(items: Sequence[Mapping[Role, Example]]) -> list[tuple[Role, Example]]:
    """The sequences of items {Role: Example}: FORGET first, then RETAIN, then PREFERRED, in the order of the items.

    Raises:
        ValueError: an item is something else.
    """
    for number, item in enumerate(items):
        if not isinstance(item, Mapping) or not item or not set(item) <= set(Role):
            given = sorted(map(str, item)) if isinstance(item, Mapping) else type(item).__name__
            raise ValueError(
                f"item {number} must be {{Role: Example}}, as of a PairedDataset, {{Role.FORGET: example}} for one, "
                f"but is or has {given}"
            )
    return [(role, item[role]) for role in Role for item in items if role in item]


def first_fit(lengths: Sequence[int], row_tokens: int) -> list[list[int]]:
    """Rows of indices: each length goes to the first row with room for it, in turn.

    Raises:
        ValueError: a length exceeds row_tokens.
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for index, length in enumerate(lengths):
        if length > row_tokens:
            raise ValueError(f"sequence {index} has {length} tokens, more than row_tokens = {row_tokens}")
        row = next((r for r, free in enumerate(room) if length <= free), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(row_tokens)
        rows[row].append(index)
        room[row] -= length
    return rows


def _lengths(examples: Sequence[Example]) -> list[int]:
    if not examples:
        raise ValueError("examples must not be empty")
    lengths = [len(example["input_ids"]) for example in examples]
    for s, (example, length) in enumerate(zip(examples, lengths, strict=True)):
        if length == 0 or len(example["labels"]) != length:
            raise ValueError(
                f"sequence {s} has {length} input_ids and {len(example['labels'])} labels; expected as many, and not 0"
            )
    return lengths
