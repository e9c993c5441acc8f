"""Which retain sequence goes with which forget sequence."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

from torch.utils.data import Dataset

from loku.data.examples import Example
from loku.data.roles import Role


class PairedDataset(Dataset):
    """Item i: sequence i of the first role, with what goes with it of the others, as {Role: Example}.

    RETAIN, where it is not the first role, is drawn as published with TOFU (arXiv 2401.06121): sequence
    (i + offset) % len, with an offset drawn uniformly anew for each item and epoch. The offset is a function of (seed,
    epoch, i) alone, so neither workers, nor ranks, nor a resumed run change the pairs. PREFERRED belongs to FORGET,
    index by index.

    Args:
        examples: the sequences of each role. The first one's number is the length of the data set.
        seed: of the pairs.

    Raises:
        ValueError: a role has no sequences; PREFERRED comes without FORGET or in another number; FORGET comes second.
    """

    def __init__(self, examples: Mapping[Role, Sequence[Example]], *, seed: int = 0) -> None:
        self.examples = dict(examples)
        self.seed = seed
        self.epoch = 0
        if not self.examples:
            raise ValueError("examples must have the sequences of at least one role, got none")
        for role, sequences in self.examples.items():
            if len(sequences) == 0:
                raise ValueError(f"examples has no {role.name.lower()} sequences")
        self._primary = next(iter(self.examples))
        if Role.FORGET in self.examples and self._primary is not Role.FORGET:
            raise ValueError(f"Role.FORGET must come first in examples, got {self._primary!r} before it")
        if Role.PREFERRED in self.examples:
            preferred, forget = len(self.examples[Role.PREFERRED]), len(self.examples.get(Role.FORGET, ()))
            if preferred != forget:
                raise ValueError(
                    f"examples needs a preferred sequence for each forget sequence, got {preferred} for {forget}"
                )

    def __len__(self) -> int:
        return len(self.examples[self._primary])

    def __getitem__(self, index: int) -> dict[Role, Example]:
        if not 0 <= index < len(self):
            raise IndexError(f"index must be at least 0 and below {len(self)}, got {index}")
        return {role: sequences[self._index(role, index)] for role, sequences in self.examples.items()}

    def set_epoch(self, epoch: int) -> None:
        """Draw the pairs of this epoch from now on.

        accelerate's data loaders call it in a single process only (with several, they set the epoch of the sampler and
        stop there), and workers that persist keep their copy's epoch: call it before each epoch, and let workers go.
        """
        self.epoch = epoch

    def _index(self, role: Role, index: int) -> int:
        if role is not Role.RETAIN or role is self._primary:
            return index
        count = len(self.examples[role])
        # Seeded by text: Python hashes that the same way in every process and version.
        return (index + random.Random(f"{self.seed} {self.epoch} {index}").randrange(count)) % count
