"""The cached result of the importance pass: one vector a module."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from loku.files import replacing

_FORMAT = "loku-fila-row-weights-1"


class FilaStateDict(dict[str, Tensor]):
    """Module name (in the base model) -> row weights (out,), float32.

    Attributes:
        fingerprints: module name -> fingerprint of the weight that it was computed for; checked when it is used.
        importance: how it was computed (eps, eps_mode, granularity), and by a command of which sets, for the record.
    """

    def __init__(
        self,
        row_weights: Mapping[str, Tensor] = {},
        fingerprints: Mapping[str, str] = {},
        importance: Mapping[str, object] = {},
    ):
        super().__init__(row_weights)
        self.fingerprints = dict(fingerprints)
        self.importance = dict(importance)

    def save(self, path: str | os.PathLike) -> None:
        """Writes one safetensors file, under a temporary name first."""
        metadata = {"fingerprints": json.dumps(self.fingerprints), "importance": json.dumps(self.importance)}
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.items()}
        with replacing(path) as temporary:
            save_file(tensors, temporary, metadata={"format": _FORMAT, **metadata})

    @classmethod
    def load(cls, path: str | os.PathLike, device: torch.device | str = "cpu") -> FilaStateDict:
        """Reads what `save` wrote. Raises ValueError for any other file."""
        with opened(path, device) as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != _FORMAT:
                raise ValueError(f"{path} does not hold FILA row weights (format {metadata.get('format')!r})")
            return cls(
                {name: file.get_tensor(name) for name in file.keys()},  # noqa: SIM118 (not a mapping)
                json.loads(metadata["fingerprints"]),
                json.loads(metadata["importance"]),
            )


@contextmanager
def opened(path: str | os.PathLike, device: torch.device | str = "cpu") -> Iterator[safe_open]:
    """A safetensors file to read from. Raises ValueError if it is cut short or none at all."""
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from error
