"""Batches of similar lengths for passes in which the order does not matter."""

from __future__ import annotations

from collections.abc import Sequence

from loku.data.examples import Example


def token_budget_batches(examples: Sequence[Example], max_tokens: int) -> list[list[int]]:
    """Batches of indices, longest first, each of at most ``max_tokens`` tokens when padded to its longest sequence.

    Every index is in one batch. A sequence longer than max_tokens is a batch by itself. The largest batches come first,
    so a pass that runs out of memory does so at its start.

    Raises:
        ValueError: max_tokens is not positive.
    """
    if max_tokens < 1:
        raise ValueError(f"max_tokens must be positive, got {max_tokens}")
    lengths = [len(example["input_ids"]) for example in examples]
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= max_tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches
