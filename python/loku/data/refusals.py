"""What a model should say in place of what it forgets, for methods that want a preferred answer."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from loku.data.json_lines import Record, place_of

DEFAULT_REFUSALS = (
    "I don't know.",
    "I don't know the answer to that.",
    "I have no information about this.",
    "That is not something I know.",
    "I'm afraid I can't answer that.",
    "I couldn't tell you.",
    "I never learned about that.",
    "I don't have an answer to this question.",
)


def load_refusals(path: str | Path) -> list[str]:
    """The lines of a text file, blank ones left out, such as the ``idontknow.jsonl`` published with TOFU.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it has no lines.
    """
    refusals = [line.strip() for line in Path(path).read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    if not refusals:
        raise ValueError(f"{path}: the file holds no refusals")
    return refusals


def with_refusals(
    records: Iterable[Mapping[str, Any]], refusals: Sequence[str] = DEFAULT_REFUSALS, *, seed: int = 0
) -> list[dict[str, Any]]:
    """The records, each with a refusal for its ``answer``, drawn by (seed, index) alone: the PREFERRED side of a pair.

    Raises:
        ValueError: there are no refusals, or a record is not a question.
    """
    if not refusals:
        raise ValueError("refusals must not be empty")
    preferred = []
    for number, record in enumerate(records):
        place = place_of(record, number)
        if "question" not in record:
            raise ValueError(f"{place}: only a question can be refused, got the keys {sorted(record)}")
        answer = random.Random(f"{seed} {number}").choice(refusals)
        preferred.append(Record({"question": record["question"], "answer": answer}, place))
    return preferred
