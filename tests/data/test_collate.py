from __future__ import annotations

import pytest
import torch
from data_helpers import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from loku.data import IGNORE_INDEX, MODEL_INPUTS, Example, LanguageModelCollator, Role, UnlearningCollator, first_fit
from loku_kernels.sequences import label_counts, next_token_labels, sequence_offsets

X = IGNORE_INDEX


def sequence(*input_ids: int, prompt: int = 0) -> Example:
    return {"input_ids": list(input_ids), "labels": [X] * prompt + list(input_ids[prompt:])}


A, B, C = sequence(1, 2, 3, 4, prompt=1), sequence(5, 6, 7, prompt=2), sequence(8, 9)


def test_padded():
    batch = LanguageModelCollator(pad_token_id=0)([A, B, C])
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids": [[1, 2, 3, 4], [5, 6, 7, 0], [8, 9, 0, 0]],
        "labels": [[X, 2, 3, 4], [X, X, 7, X], [8, 9, X, X]],
        "attention_mask": [[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 0, 0]],
    }
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())


def test_packed():
    """C goes back into the row of A, and rows are no longer than what lies in them."""
    batch = LanguageModelCollator(pad_token_id=0, row_tokens=6)([A, B, C])
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids": [[1, 2, 3, 4, 8, 9], [5, 6, 7, 0, 0, 0]],
        "labels": [[X, 2, 3, 4, 8, 9], [X, X, 7, X, X, X]],
        "position_ids": [[0, 1, 2, 3, 0, 1], [0, 1, 2, 0, 1, 2]],
    }
    assert LanguageModelCollator(pad_token_id=0, row_tokens=1000)([B, C])["input_ids"].shape == (1, 5)


def test_positions_of_padding_stay_within_those_of_sequences():
    """A row much longer than any sequence: its padding must not ask for positions that the model lacks."""
    batch = LanguageModelCollator(0, row_tokens=12)([A, A, A, C])
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3] * 3, [0, 1, *[0, 1, 2, 3] * 2, 0, 1]]


def test_tensors_as_examples():
    tensors = {name: torch.tensor(values, dtype=torch.int32) for name, values in A.items()}
    assert torch.equal(LanguageModelCollator(0)([tensors])["labels"], LanguageModelCollator(0)([A])["labels"])


def test_unlearning_batch_padded():
    batch = UnlearningCollator(pad_token_id=0)([{Role.FORGET: B, Role.RETAIN: A}, {Role.FORGET: C, Role.RETAIN: B}])
    assert batch["input_ids"].tolist() == [[5, 6, 7, 0], [8, 9, 0, 0], [1, 2, 3, 4], [5, 6, 7, 0]]
    assert batch["roles"].tolist() == [Role.FORGET, Role.FORGET, Role.RETAIN, Role.RETAIN]
    assert batch["rows"].tolist() == [1, 4, 8, 9, 10, 13]
    assert batch["targets"].tolist() == [7, 9, 2, 3, 4, 7]
    assert batch["row_sequences"].tolist() == [0, 1, 2, 2, 2, 3]
    assert set(batch) - {"labels", "roles", "rows", "targets", "row_sequences", "tokens"} <= set(MODEL_INPUTS)


def test_unlearning_batch_packed():
    """The number of a sequence does not depend on where it lies: here 0 2 / 1."""
    items = [{Role.FORGET: A}, {Role.FORGET: B, Role.RETAIN: C}]
    batch = UnlearningCollator(pad_token_id=0, row_tokens=6)(items)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 8, 9], [5, 6, 7, 0, 0, 0]]
    assert batch["roles"].tolist() == [Role.FORGET, Role.FORGET, Role.RETAIN]
    assert batch["rows"].tolist() == [0, 1, 2, 4, 7]
    assert batch["targets"].tolist() == [2, 3, 4, 9, 7]  # not C's first label after A's last token
    assert batch["row_sequences"].tolist() == [0, 0, 0, 2, 1]


def scored(batch: dict[str, Tensor]) -> list[list[tuple[list[int], int]]]:
    """(context, target) of each scored token of each sequence, with contexts read off the batch."""
    length = batch["input_ids"].shape[1]
    positions = batch["position_ids"] if "position_ids" in batch else torch.arange(length).expand_as(batch["input_ids"])
    pairs: list[list[tuple[list[int], int]]] = [[] for _ in batch["roles"]]
    for row, target, number in zip(
        *(batch[name].tolist() for name in ("rows", "targets", "row_sequences")), strict=True
    ):
        begin = row - int(positions.flatten()[row])
        pairs[number].append((batch["input_ids"].flatten()[begin : row + 1].tolist(), target))
    return pairs


@settings(deadline=None)
@given(st.lists(st.fixed_dictionaries(dict.fromkeys(Role, examples())), min_size=1, max_size=5), st.integers(9, 40))
def test_packing_and_padding_score_the_same(items: list[dict[Role, Example]], row_tokens: int):
    sequences = [item[role] for role in Role for item in items]
    defined = [
        [(s["input_ids"][:i], s["labels"][i]) for i in range(1, len(s["labels"])) if s["labels"][i] != X]
        for s in sequences
    ]
    for collator in (UnlearningCollator(0), UnlearningCollator(0, row_tokens)):
        batch = collator(items)
        assert scored(batch) == defined
        assert batch["roles"].tolist() == [role for role in Role for _ in items]
        assert bool((batch["rows"].diff() > 0).all())
        if collator.row_tokens:
            assert batch["input_ids"].shape[1] <= row_tokens


@settings(deadline=None)
@given(st.lists(examples(), min_size=1, max_size=6), st.integers(9, 30))
def test_kernels_count_the_same_labels(sequences: list[Example], row_tokens: int):
    """`loku_kernels.sequences`, which the Fisher information uses, finds the sequences in both forms."""
    expected = sorted(sum(label != X for label in s["labels"][1:]) for s in sequences)
    for collator in (LanguageModelCollator(0), LanguageModelCollator(0, row_tokens)):
        batch = collator(sequences)
        offsets = sequence_offsets(batch)
        counts = label_counts(next_token_labels(batch["labels"], offsets, X), offsets, X)
        assert sorted(count for count in counts.tolist() if count) == expected


@given(st.lists(st.integers(1, 10), max_size=30), st.integers(10, 25))
def test_first_fit(lengths: list[int], row_tokens: int):
    rows = first_fit(lengths, row_tokens)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    assert all(row == sorted(row) and sum(lengths[i] for i in row) <= row_tokens for row in rows)
    for r, row in enumerate(rows):  # what lies in a row had no room in an earlier one when its turn came
        for index in row:
            assert all(
                sum(lengths[i] for i in earlier if i < index) + lengths[index] > row_tokens for earlier in rows[:r]
            )


@pytest.mark.parametrize(
    ("collator", "batch", "message"),
    [
        (LanguageModelCollator(0), [], "examples must not be empty"),
        (LanguageModelCollator(0), [A, sequence()], "sequence 1 has 0 input_ids"),
        (LanguageModelCollator(0), [{"input_ids": [1, 2], "labels": [1]}], "2 input_ids and 1 labels"),
        (LanguageModelCollator(0, 3), [C, A], "sequence 1 has 4 tokens, more than row_tokens = 3"),
        (UnlearningCollator(0), [], "examples must not be empty"),
        (
            UnlearningCollator(0),
            [{Role.FORGET: A, Role.RETAIN: {"input_ids": [1, 2], "labels": [1, X]}}],
            r"sequence 1 \(retain\) has no token to score",
        ),
    ],
)
def test_refused_batches(collator, batch, message):
    with pytest.raises(ValueError, match=message):
        collator(batch)


def test_padding_is_a_token_of_the_batch_where_none_is_named():
    assert LanguageModelCollator()([B, A])["input_ids"].unique().tolist() == sorted({*A["input_ids"], *B["input_ids"]})


@pytest.mark.parametrize("kind", [LanguageModelCollator, UnlearningCollator])
def test_refused_settings(kind):
    with pytest.raises(ValueError, match="pad_token_id must be a token id"):
        kind("0")
    with pytest.raises(ValueError, match="row_tokens must be positive"):
        kind(0, 0)
