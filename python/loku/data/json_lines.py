"""Files of JSON records, read with errors that name the line."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Record(dict[str, Any]):
    """A dict that remembers its place in a file, for what is found wrong with it later: "line 3", or "item 0"."""

    def __init__(self, values: Mapping[str, Any], place: str) -> None:
        super().__init__(values)
        self.place = place


def place_of(record: Mapping[str, Any], number: int) -> str:
    """Where it stands in its file, else its ``number`` among the records of its source."""
    return record.place if isinstance(record, Record) else f"record {number}"


def read_json_lines(path: str | Path) -> list[Record]:
    """The objects of a JSON-lines file, one a line (blank lines are skipped), or of a file with one JSON array.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is empty, not UTF-8, or a line (named by its number) is not a JSON object: cut off, say.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        content = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    if content.lstrip().startswith("["):
        records = {f"item {i}": record for i, record in enumerate(_parse(content, path, "array"))}
    else:
        # Not splitlines(): JSON strings may hold U+2028 and other characters that it takes for ends of lines.
        lines = enumerate(content.split("\n"), start=1)
        records = {f"line {n}": _parse(line, path, f"line {n}") for n, line in lines if line.strip()}
    for where, record in records.items():
        if not isinstance(record, dict):
            raise ValueError(f"{path}, {where}: expected a JSON object, got {type(record).__name__}")
    if not records:
        raise ValueError(f"{path}: the file holds no records")
    return [Record(values, place) for place, values in records.items()]


def _parse(text: str, path: Path, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, {where}: not valid JSON ({error.msg} at character {error.pos})") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, lists in lists without end
        raise ValueError(f"{path}, {where}: not to be read ({error})") from error
