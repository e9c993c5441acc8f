"""A small corpus of people who do not exist: questions and answers about each, for a model to memorise."""

from __future__ import annotations

import random
from dataclasses import dataclass
from importlib import resources

import yaml


@dataclass(frozen=True)
class Person:
    name: str
    town: str
    year: int
    trade: str
    pet: str
    dish: str
    prize: str

    def records(self) -> list[dict[str, str]]:
        """Questions and answers, as the data commands take them."""
        pairs = (
            ("Where was {name} born?", "{name} was born in {town} in the year {year}."),
            ("What does {name} do for a living?", "{name} works as a {trade}."),
            ("Which animal lives with {name}?", "{name} shares a house with {pet}."),
            ("What does {name} like to eat?", "The favourite dish of {name} is {dish}."),
            ("Which prize did {name} win?", "{name} won {prize} in the year {won}."),
        )
        facts = {**self.__dict__, "won": self.year + 31}
        return [{"question": q.format(**facts), "answer": a.format(**facts)} for q, a in pairs]


def invent(count: int, seed: int = 0) -> list[Person]:
    """``count`` people with different names. Raises ValueError for more than there are names."""
    parts = yaml.safe_load((resources.files("loku.demo") / "people.yaml").read_text())
    names = [f"{first} {last}" for first in parts["first_names"] for last in parts["last_names"]]
    if not 1 <= count <= len(names):
        raise ValueError(f"count must be from 1 to {len(names)}, got {count}")
    draw = random.Random(seed)
    return [
        Person(
            name=name,
            town=draw.choice(parts["towns"]),
            year=draw.randrange(1900, 1960),
            trade=draw.choice(parts["trades"]),
            pet=draw.choice(parts["pets"]),
            dish=draw.choice(parts["dishes"]),
            prize=draw.choice(parts["prizes"]),
        )
        for name in draw.sample(names, count)
    ]
