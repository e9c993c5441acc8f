"""Raw records of a data source, nothing tokenised."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from datasets import load_dataset

from loku.data.examples import IGNORE_INDEX, is_question
from loku.data.json_lines import read_json_lines

TOFU_SPLITS = (
    "full",
    *(f"{kind}{percent}" for kind in ("forget", "holdout") for percent in ("01", "05", "10")),
    *(f"retain{percent}" for percent in ("99", "95", "90")),
    "real_authors",
    "world_facts",
    *(f"{name}_perturbed" for name in ("forget01", "forget05", "forget10", "retain", "real_authors", "world_facts")),
)
WIKITEXT_SPLITS = {"train": "train", "validation": "valid", "test": "test"}  # the hub's name: the file's
TDEC_SETS = {"tdec": "val", "tdec:train": "train"}  # the source: its files
_TDEC_PARTS = ("preprefix", "prefix", "suffix")


def load_records(source: str, data_dir: str | Path | None = None) -> list[dict[str, Any]]:
    """Records of a source: a list of dicts with the keys given below.

    - a split of TOFU (`TOFU_SPLITS`; "forget10", say): ``question``, ``answer``, and in ``*_perturbed`` splits also
      ``paraphrased_answer``, ``perturbed_answer`` (a list) and, but for authors and facts, ``paraphrased_question``.
      From ``data_dir/tofu/<split>.json``, else the hub's data set locuslab/TOFU.
    - "tdec", "tdec:train": ``input_ids``, the 200 GPT-2 tokens of each of the 1,000 sequences of the Training Data
      Extraction Challenge's validation set, or of the 15,000 of its training set. From ``val_preprefix.npy``,
      ``val_prefix.npy`` and ``val_suffix.npy`` in ``data_dir/tdec``, or their likes for ``train``; the latter else from
      the hub's data set dar-tau/lm-extraction-benchmark.
    - "wikitext2:train", "wikitext2:validation", "wikitext2:test": ``text``, a record an article; joined, they are the
      whole. From ``data_dir/wikitext2/{train,valid,test}.txt``, else the hub's data set Salesforce/wikitext.
    - a path that ends in .jsonl or .json, of objects with ``question`` and ``answer``, or ``text``, or ``input_ids``.

    Any of them may end in rows: "tdec[0:32]", counted as Python does.

    Args:
        data_dir: folder of data; by default the environment variable LOKU_DATA, or none.

    Raises:
        FileNotFoundError: data_dir, or a file named by source, does not exist; the files of "tdec" are not in data_dir.
        ValueError: there is no such source or split; a file is corrupt or empty (the line is named); the rows are empty
            or reach beyond the end.
        ConnectionError: neither the folder nor the hub gave the data.
    """
    name, rows = _split_rows(source)
    folder = _folder(data_dir)
    if name.endswith((".jsonl", ".json")):
        records = _user_records(name)
    elif name in TDEC_SETS:
        records = _tdec(name, folder)
    elif name.partition(":")[0] == "wikitext2":
        records = _wikitext(name, folder)
    elif name in TOFU_SPLITS:
        records = _tofu(name, folder)
    else:
        raise ValueError(
            f"source {source!r} is none of TOFU's splits ({', '.join(TOFU_SPLITS)}), {', '.join(TDEC_SETS)}, "
            f"{', '.join(f'wikitext2:{split}' for split in WIKITEXT_SPLITS)}, or a path that ends in .jsonl or .json; "
            "rows may follow, as in tdec[0:32]"
        )
    return records if rows is None else _slice(records, rows, source)


def _user_records(path: str) -> list[dict[str, Any]]:
    records = read_json_lines(path)
    for record in records:
        problem = _problem(record)
        if problem is not None:
            raise ValueError(f"{path}, {record.place}: {problem}")
    return records


def _problem(record: Mapping[str, Any]) -> str | None:
    if "input_ids" in record:
        return _problem_of_tokens(*(record.get(name) for name in ("input_ids", "labels", "attention_mask")))
    keys = ("question", "answer") if is_question(record) else ("text",)
    if any(key not in record for key in keys):
        return f"expected question and answer, text, or input_ids, got the keys {sorted(record)}"
    for key in keys:
        if not isinstance(record[key], str):
            return f"{key} must be a string, got {record[key]!r}"
        if half := re.search("[\ud800-\udfff]", record[key]):
            return f"{key} must be text, but {half[0]!a} at character {half.start()} is half of a surrogate pair"
    return None


def _problem_of_tokens(input_ids: Any, labels: Any, attention_mask: Any) -> str | None:
    if not _are_numbers(input_ids) or not input_ids or min(input_ids) < 0:
        return "input_ids must be a list of token ids, not empty"
    if labels is not None and not (_are_numbers(labels) and all(x >= 0 or x == IGNORE_INDEX for x in labels)):
        return f"labels must be a list of token ids, and {IGNORE_INDEX} where nothing is scored"
    if attention_mask is not None and not (_are_numbers(attention_mask) and set(attention_mask) <= {0, 1}):
        return "attention_mask must be a list of ones, and 0 where there is padding"
    return None


def _are_numbers(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int for value in values)


def _tofu(split: str, folder: Path | None) -> list[dict[str, Any]]:
    path = folder and folder / "tofu" / f"{split}.json"
    if path is not None and path.is_file():
        return read_json_lines(path)
    return list(_from_hub("locuslab/TOFU", split, "train", path))


def _wikitext(source: str, folder: Path | None) -> list[dict[str, Any]]:
    split = source.partition(":")[2]
    if split not in WIKITEXT_SPLITS:
        raise ValueError(
            f"source {source!r}: the splits are {', '.join(f'wikitext2:{name}' for name in WIKITEXT_SPLITS)}"
        )
    path = folder and folder / "wikitext2" / f"{WIKITEXT_SPLITS[split]}.txt"
    if path is not None and path.is_file():
        text = path.read_text(encoding="utf-8")
    else:
        rows = _from_hub("Salesforce/wikitext", "wikitext-2-raw-v1", split, path)
        text = "".join(row["text"] or " \n" for row in rows)  # the hub leaves blank lines empty
    # A title stands between blank lines, in one = on each side; titles of sections have more.
    return [{"text": article} for article in re.split(r"(?<=\n \n)(?= = [^=\n]+ = \n \n)", text)]


def _tdec(source: str, folder: Path | None) -> list[dict[str, Any]]:
    names = [f"{TDEC_SETS[source]}_{part}.npy" for part in _TDEC_PARTS]
    paths = [folder and folder / "tdec" / name for name in names]
    if folder is None or not all(path.is_file() for path in paths):
        if source == "tdec:train":
            rows = _from_hub("dar-tau/lm-extraction-benchmark", "default", "train", paths[0])
            return [{"input_ids": [token for part in _TDEC_PARTS for token in row[part]]} for row in rows]
        raise FileNotFoundError(
            f"tdec needs {', '.join(names)} (from google-research/lm-extraction-benchmark) in the folder tdec of "
            f"data_dir or of LOKU_DATA, which is {folder}; tdec:train can be had from the hub"
        )
    try:
        sequences = np.concatenate([np.load(path, allow_pickle=False) for path in paths], axis=1)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{folder / 'tdec'}: the arrays cannot be read and joined: {error}") from error
    return [{"input_ids": tokens} for tokens in sequences.tolist()]


def _from_hub(name: str, configuration: str, split: str, path: Path | None) -> Any:
    try:
        return load_dataset(name, configuration, split=split)
    except Exception as error:  # the hub's clients have many, and the user needs the same advice for all
        where = f"{path} does not exist" if path is not None else "neither data_dir nor LOKU_DATA is set"
        raise ConnectionError(
            f"{where}, and {name} ({configuration}, {split}) cannot be had from the hub: "
            f"{type(error).__name__}: {error}"
        ) from error


def _folder(data_dir: str | Path | None) -> Path | None:
    given = data_dir if data_dir is not None else os.environ.get("LOKU_DATA")
    if not given:
        return None
    if not Path(given).is_dir():
        raise FileNotFoundError(f"data_dir (or LOKU_DATA) must be a folder, got {str(given)!r}")
    return Path(given)


def _split_rows(source: str) -> tuple[str, slice | None]:
    match = re.fullmatch(r"(.+)\[(-?\d+)?:(-?\d+)?\]", source)
    if match is None:
        return source, None
    return match[1], slice(*(None if bound is None else int(bound) for bound in match.groups()[1:]))


def _slice(records: list[dict[str, Any]], rows: slice, source: str) -> list[dict[str, Any]]:
    beyond = any(bound is not None and abs(bound) > len(records) for bound in (rows.start, rows.stop))
    if beyond or not records[rows]:
        raise ValueError(f"source {source!r} must name rows that exist: there are {len(records)}")
    return records[rows]
