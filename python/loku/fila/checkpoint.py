"""Where an importance pass goes on after it was broken off."""

from __future__ import annotations

import glob
import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor, distributed

from loku.fila.state import FilaStateDict, opened
from loku.files import replacing
from loku_kernels.fisher_accumulator import FisherAccumulator

Accumulators = Mapping[str, FisherAccumulator]


class ImportanceCheckpoint:
    """Files that hold what a pass of `get_fila_state_dict` has done so far; each is whole or not there.

    ``path``: row weights of the groups of modules that are done. Beside it, for each rank, ``path`` with
    ``.sums-RANK`` at its end: the Fisher sums of the group at work, and how many batches of each set are in them.

    Args:
        path: one that all ranks see.
        every: seconds between writing the sums, which are as large as the weights of the group, in float32, twice.
        data: a name for the contents of both data sets. A checkpoint of others is refused.
    """

    def __init__(self, path: str | os.PathLike, every: float = 600.0, data: str = "") -> None:
        self.path, self.every, self.data = Path(path), every, data
        self._written = time.monotonic()

    def load_finished(self, state: FilaStateDict) -> None:
        """Adds what earlier starts finished. ValueError if they were of another model, other data or settings."""
        state.importance["data"] = self.data
        if not self.path.exists():
            return
        found = FilaStateDict.load(self.path)
        _check_identity(_identity(found), state, self.path)
        state.update(found)

    def load_sums(self, state: FilaStateDict, group: Sequence[str], accumulators: Accumulators) -> dict[str, int]:
        """Batches of each set that need not be gone through again, whose sums the accumulators now hold.

        ValueError if they were of another model, other data or settings, or their file is not whole.
        """
        done = dict.fromkeys(accumulators, 0)
        if not self._sums.exists():
            return done
        with opened(self._sums) as file:
            metadata = file.metadata() or {}
            _check_identity(metadata.get("of"), state, self._sums)
            # Sums of another group are done with; with other ranks each would have had other batches.
            if metadata["share"] != _share(group):
                return done
            for which, batches in json.loads(metadata["done"]).items():
                keys = [key for key in file.keys() if key.startswith(f"{which}.")]  # noqa: SIM118 (not a mapping)
                accumulators[which].load_state_dict({k.removeprefix(f"{which}."): file.get_tensor(k) for k in keys})
                done[which] = batches
        return done

    def keep_sums(
        self, state: FilaStateDict, group: Sequence[str], accumulators: Accumulators, done: Mapping[str, int]
    ) -> None:
        """Writes the sums, if that was long ago."""
        if time.monotonic() - self._written < self.every:
            return
        begun = {which: batches for which, batches in done.items() if batches > 0}
        tensors: dict[str, Tensor] = {}
        for which in begun:
            tensors |= {f"{which}.{key}": tensor for key, tensor in accumulators[which].state_dict().items()}
        metadata = {"of": _identity(state), "share": _share(group), "done": json.dumps(begun)}
        with replacing(self._sums) as temporary:
            save_file(tensors, temporary, metadata=metadata)
        self._written = time.monotonic()

    def finish_group(self, state: FilaStateDict) -> None:
        if rank_and_ranks()[0] == 0:
            state.save(self.path)
        self._sums.unlink(missing_ok=True)

    def remove(self) -> None:
        """Once the whole is stored elsewhere; the sums too of processes that an earlier start had more."""
        for path in (self.path, *self.path.parent.glob(f"{glob.escape(self.path.name)}.sums-*")):
            path.unlink(missing_ok=True)

    @property
    def _sums(self) -> Path:
        return self.path.with_name(f"{self.path.name}.sums-{rank_and_ranks()[0]}")


def _identity(state: FilaStateDict) -> str:
    """The model, the data's name and the settings."""
    return json.dumps([state.fingerprints, state.importance], sort_keys=True)


def _check_identity(found: str | None, state: FilaStateDict, path: Path) -> None:
    if found != _identity(state):
        raise ValueError(f"{path} was begun with another model, other data or other settings; delete it")


def _share(group: Sequence[str]) -> str:
    """Which modules' sums these are, over how much of the data."""
    return json.dumps([list(group), rank_and_ranks()[1]])


def rank_and_ranks() -> tuple[int, int]:
    """This process's number, and how many there are under torch.distributed."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1
