"""Files and folders that are either whole or not there."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

_TORCH_WRITER = ("inline_container", "PytorchStreamWriter")  # what torch.save's errors name; they are RuntimeErrors


@contextmanager
def writing(path: str | os.PathLike) -> Iterator[None]:
    """What cannot be written under ``path`` (a full disk, say) is an OSError, whichever library was writing."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not any(name in str(error) for name in _TORCH_WRITER):
            raise
        raise OSError(f"{path} cannot be written: {error}") from error


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary name beside ``path``, for a file that takes its place when the block ends without an error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with writing(path):
            yield temporary
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def filling(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary folder whose contents are moved into ``path``, file by file, when the block ends without an error."""
    path = Path(path).resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as temporary, writing(path):
        yield Path(temporary)
        path.mkdir(exist_ok=True)
        for file in Path(temporary).iterdir():
            if file.is_file():
                os.replace(file, path / file.name)
            else:
                shutil.copytree(file, path / file.name, dirs_exist_ok=True)


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Indented; what JSON does not know is written as a string."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1, default=str) + "\n")


def write_json_lines(path: str | os.PathLike, lines: Iterable[Any]) -> None:
    """A value a line."""
    with replacing(path) as temporary:
        temporary.write_text("".join(json.dumps(line) + "\n" for line in lines))


def read_json_lines(path: str | os.PathLike) -> list[Any]:
    """The values of a file that may not be there; a last line that was cut short is left out.

    Raises ValueError for any other line that is not JSON.
    """
    values = []
    lines = Path(path).read_text().splitlines() if Path(path).exists() else []
    for number, text in enumerate(lines, start=1):
        try:
            values.append(json.loads(text))
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise ValueError(f"line {number} of {path} is not JSON: {error}") from error
    return values
