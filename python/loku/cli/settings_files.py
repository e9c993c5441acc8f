"""Files of settings, YAML or JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from loku.cli.errors import CommandError, blaming


class _Loader(yaml.SafeLoader):
    """YAML to which 1e-5 is a number, as it is to JSON and to Python."""


class _Dumper(yaml.SafeDumper):
    """Quotes the words that _Loader would take for numbers."""


for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+$"),
        list("-+.0123456789"),
    )


def read_mapping(path: str | Path, option: str) -> dict[str, Any]:
    """A file that holds a mapping. Raises CommandError, which names ``option``, if it is none."""
    return read_with_words(path, option)[0]


def read_with_words(path: str | Path, option: str) -> tuple[dict[str, Any], dict[str, str]]:
    """As `read_mapping`, and beside it the mapping's single values as they are written in the file."""
    if not Path(path).is_file():
        raise CommandError(f"{option} must be a YAML file, but {path} does not exist")
    with blaming(f"{option} {path} is not valid YAML", yaml.YAMLError, RecursionError):
        values, words = parsed(Path(path).read_text())
    if not isinstance(values, dict):
        raise CommandError(f"{option} {path} must hold a mapping, but holds a {type(values).__name__}")
    return values, words


def parsed(text: str) -> tuple[Any, dict[str, str]]:
    """The values in YAML or JSON, and of a mapping the single ones as they are written."""
    try:
        values = json.loads(text)  # which may be indented by tabs, as YAML may not
    except ValueError:
        loader = _Loader(text)
        node = loader.get_single_node()
        pairs = node.value if isinstance(node, yaml.MappingNode) else []
        words = {key.value: value.value for key, value in pairs if isinstance(value, yaml.ScalarNode)}
        return None if node is None else loader.construct_document(node), words
    return values, {key: json.dumps(value) for key, value in values.items()} if isinstance(values, dict) else {}


def dump(values: Mapping[str, Any]) -> str:
    """As YAML that reads back as it was."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False)
