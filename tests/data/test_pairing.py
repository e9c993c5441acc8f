from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch.utils.data import DataLoader

from loku.data import PairedDataset, Role, UnlearningCollator, token_budget_batches


def sequences(count: int, first: int = 0):
    return [{"input_ids": [first + i, 0], "labels": [first + i, 0]} for i in range(count)]


def retained(pairs: PairedDataset) -> list[int]:
    return [pairs[i][Role.RETAIN]["input_ids"][0] for i in range(len(pairs))]


def test_primary_and_preferred_go_by_index():
    roles = {Role.FORGET: sequences(5), Role.RETAIN: sequences(9, 100), Role.PREFERRED: sequences(5, 200)}
    pairs = PairedDataset(roles)
    assert len(pairs) == 5
    for i in range(5):
        assert list(pairs[i]) == [Role.FORGET, Role.RETAIN, Role.PREFERRED]
        assert pairs[i][Role.FORGET]["input_ids"][0] == i
        assert pairs[i][Role.PREFERRED]["input_ids"][0] == 200 + i
    alone = PairedDataset({Role.RETAIN: sequences(9)})
    assert retained(alone) == list(range(9))


def test_retain_draws_depend_on_seed_epoch_and_index_alone():
    def fresh(seed: int) -> PairedDataset:
        return PairedDataset({Role.FORGET: sequences(40), Role.RETAIN: sequences(1000)}, seed=seed)

    pairs = fresh(3)
    epochs = []
    for epoch in range(3):
        pairs.set_epoch(epoch)
        epochs.append(retained(pairs))
    assert len({tuple(epoch) for epoch in epochs}) == 3
    resumed = fresh(3)
    resumed.set_epoch(2)
    assert [resumed[i][Role.RETAIN]["input_ids"][0] for i in reversed(range(40))] == epochs[2][::-1]
    assert retained(fresh(4)) != epochs[0]
    # As first drawn: neither a change of Python nor one of this code may change the pairs of a run.
    assert epochs[0][:5] == [980, 477, 894, 613, 140]


def test_retain_draws_are_uniform_offsets():
    """4,000 draws in 8 bins, whose chi-squared exceeds 24.3 once in a thousand seeds; and not i + constant."""
    pairs = PairedDataset({Role.FORGET: sequences(4000), Role.RETAIN: sequences(8)})
    drawn = retained(pairs)
    assert sum((count - 500) ** 2 / 500 for count in Counter(drawn).values()) < 24.3
    assert set(drawn) == set(range(8))
    assert len({(value - i) % 8 for i, value in enumerate(drawn)}) == 8


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_do_not_change_the_pairs(workers: int):
    pairs = PairedDataset({Role.FORGET: sequences(6), Role.RETAIN: sequences(50)}, seed=1)
    expected = []
    for epoch in range(2):
        pairs.set_epoch(epoch)
        expected.extend(retained(pairs))
    loader = DataLoader(pairs, batch_size=2, num_workers=workers, collate_fn=UnlearningCollator(0))
    found = []
    for epoch in range(2):
        pairs.set_epoch(epoch)
        found.extend(row for batch in loader for row in batch["input_ids"][batch["roles"] == Role.RETAIN, 0].tolist())
    assert found == expected


def test_torch_generators_are_left_alone():
    pairs = PairedDataset({Role.FORGET: sequences(6), Role.RETAIN: sequences(50)})
    before = torch.get_rng_state()
    pairs[3]
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        ({}, "at least one role"),
        ({Role.FORGET: sequences(2), Role.RETAIN: []}, "no retain sequences"),
        ({Role.RETAIN: sequences(2), Role.FORGET: sequences(2)}, "FORGET must come first"),
        ({Role.FORGET: sequences(2), Role.PREFERRED: sequences(3)}, "got 3 for 2"),
        ({Role.PREFERRED: sequences(3)}, "got 3 for 0"),
    ],
)
def test_refused_roles(examples, message):
    with pytest.raises(ValueError, match=message):
        PairedDataset(examples)


def test_no_item_beyond_the_end():
    """Iteration by index must end."""
    pairs = PairedDataset({Role.FORGET: sequences(2)})
    assert len(list(pairs)) == 2
    with pytest.raises(IndexError, match="below 2, got -1"):
        pairs[-1]


def test_token_budget_batches():
    examples = [{"input_ids": [0] * n, "labels": [0] * n} for n in (3, 9, 1, 4, 30, 4, 2)]
    assert token_budget_batches(examples, 12) == [[4], [1], [3, 5, 0], [6, 2]]
    assert token_budget_batches([], 12) == []
    with pytest.raises(ValueError, match="max_tokens must be positive, got 0"):
        token_budget_batches(examples, 0)
