"""The commands' options: dataclasses beside ``TrainingArguments``, from the command line, YAML files and presets."""

from __future__ import annotations

import dataclasses
import difflib
from argparse import Namespace
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

from transformers import HfArgumentParser

from loku.cli.checks import check_values, warn_of_unused
from loku.cli.errors import CommandError, blaming
from loku.cli.settings_files import parsed, read_with_words


def option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass
class ModelOptions:
    """Which model, tokenizer and adapter."""

    _argument_group_name = "model"

    model: str | None = option(None, "causal language model: a folder or a name on the hub")
    tokenizer: str | None = option(None, "tokenizer, where it is not the model's own")
    adapter: list[str] | None = option(
        None, "LoRA adapters to merge into the model first, one or several, in this order"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option("auto", "of the weights; auto: as stored")
    attn_implementation: str | None = option(None, "sdpa, eager, flash_attention_2, ...; by default the model's own")
    trust_remote_code: bool = option(False, "run the model's own code from the hub")


@dataclass
class DataOptions:
    """Where data come from and how they are tokenised."""

    _argument_group_name = "data"

    data_dir: str | None = option(None, "folder with tofu/, tdec/, wikitext2/; by default LOKU_DATA, else the hub")
    prompt: Literal["auto", "llama2", "phi", "plain"] = option("auto", "question template; auto: by the model's family")
    max_length: int | None = option(
        None,
        "tokens; longer texts are cut into blocks, longer questions with answers are refused; "
        "by default 512, or the model's context where it is shorter",
    )


@dataclass
class AdapterOptions:
    """The LoRA adapter that is trained."""

    _argument_group_name = "adapter"

    rank: int = option(16, "r of the adapter")
    alpha: float | None = option(None, "lora_alpha; 2 * rank if not given, as published")
    targets: str = option("all", "all (but the head), attn, mlp, or comma-separated names, such as q_proj,v_proj")
    lora_dropout: float = option(0.0, "dropout before the adapter")


@dataclass
class ImportanceOptions:
    """FILA: where row weights come from. Arguments of `loku.fila.FilaConfig`."""

    _argument_group_name = "importance, for methods with FILA"

    importance: str | None = option(None, "importance.safetensors of `loku importance`; computed if not given")
    fila_mode: Literal["residual", "shadow"] = option("residual", "how the initial factors leave the base model")
    fila_eps: float = option(1e-5, "eps in F_forget / (eps + F_retain)")
    fila_eps_mode: Literal["absolute", "relative"] = option("absolute", "eps as it is, or times the mean of F_retain")
    fisher_granularity: Literal["sequence", "token", "batch"] = option("sequence", "what is squared")
    fisher_memory_budget: int | None = option(None, "bytes for Fisher matrices; where too few, more passes")
    fisher_batch_tokens: int = option(2048, "tokens of one batch of the importance pass")
    fisher_save_minutes: float = option(10.0, "time between writing the Fisher sums, for a pass that is broken off")
    fisher_retain_size: int | None = option(None, "retain examples for F_retain; by default as many as forget examples")


def parse(command: str, option_types: list[type], argv: list[str], description: str, **fixed: Any) -> list[Any]:
    """Instances of the dataclasses, from ``argv``.

    ``--preset NAME`` and ``--config FILE`` (YAML, keys as the options are named) give defaults, the latter before the
    former, and options on the command line override both. With ``--resume``, where the command has it, the
    ``config.yaml`` that the run left in ``--output_dir`` gives defaults, before which all others go. ``fixed`` are
    options that the command itself decides.

    Raises:
        CommandError: no such preset or file, a file that is not a mapping, an option that there is not, a value that an
            option does not take, or a ``--config`` that is the ``config.yaml`` which a new run would write.
        SystemExit: argparse's, for --help.
    """
    parser = _Parser(
        option_types,
        prog=f"loku {command}",
        usage=f"loku {command} [--config FILE] [--preset NAME] [options]",
        description=description,
        allow_abbrev=False,
    )
    parser.add_argument("--config", help="YAML or JSON file of options")
    parser.add_argument("--preset", help=f"published settings: {', '.join(preset_names())}")
    known = {name: hint for option_type in option_types for name, hint in _types(option_type).items()}
    defaults = {name: parser.get_default(name) for name in known}

    asked, _ = parser.parse_known_args(argv)
    values: dict[str, Any] = {}
    if asked.preset is not None:
        preset = _preset(asked.preset)
        # It has settings for every command, and some for one of them under that command's name.
        values |= {key: value for key, value in (preset | preset.get(command, {})).items() if key in known}
    if asked.config is not None:
        values |= _read_options(Path(asked.config), known)
    asked, _ = parser.parse_known_args(_given(parser, values, known) + argv)
    if getattr(asked, "output_dir", None) is not None:
        values = _recorded(asked, known) | values

    arguments = _given(parser, values, known) + argv
    asked, unknown = parser.parse_known_args(arguments)
    if unknown:
        raise CommandError(_unknown(unknown[0], [f"--{key}" for key in (*known, "config", "preset")]))
    for key, value in fixed.items():
        if getattr(asked, key) not in (value, parser.get_default(key)):
            raise CommandError(f"--{key} is {value} in loku {command}, but {getattr(asked, key)} was given")
    check_values(vars(asked))
    warn_of_unused(command, vars(asked), defaults)
    arguments += [f"--{key}={value}" for key, value in fixed.items()]
    with blaming():
        *options, _ = parser.parse_args_into_dataclasses(arguments, look_for_args_file=False)
    return options


def _recorded(asked: Namespace, known: Mapping[str, Any]) -> dict[str, Any]:
    """What the run that goes on was told. Raises CommandError where a new run would replace the --config given."""
    record = Path(asked.output_dir, "config.yaml")
    if getattr(asked, "resume", False):
        return _read_options(record, known) if record.is_file() else {}
    if asked.config is not None and record.resolve() == Path(asked.config).resolve():
        raise CommandError(
            f"--config {asked.config} is where the run in --output_dir {asked.output_dir} records its options, which "
            "would replace it: move the file, or choose another folder"
        )
    return {}


def preset_names() -> list[str]:
    return sorted(file.name.removesuffix(".yaml") for file in _presets().iterdir() if file.name.endswith(".yaml"))


def as_dict(*options: Any) -> dict[str, Any]:
    """All options as one flat mapping of plain values."""
    flat: dict[str, Any] = {}
    for instance in options:
        flat |= instance.to_dict() if hasattr(instance, "to_dict") else dataclasses.asdict(instance)
    return flat


class _Parser(HfArgumentParser):
    """Says what is wrong without pages of usage."""

    def error(self, message: str) -> None:
        raise CommandError(message)


def _types(option_type: type) -> dict[str, Any]:
    hints = get_type_hints(option_type)
    return {f.name: hints[f.name] for f in dataclasses.fields(option_type) if f.init}


def _presets() -> Any:
    return resources.files("loku.cli") / "presets"


def _preset(name: str) -> dict[str, Any]:
    if name not in preset_names():
        raise CommandError(f"--preset must be one of {', '.join(preset_names())}, but is {name!r}")
    return parsed((_presets() / f"{name}.yaml").read_text())[0]


def _given(parser: HfArgumentParser, values: Mapping[str, Any], known: Mapping[str, Any]) -> list[str]:
    """Values of a file as arguments, so that they are read and checked as those; lists and mappings as defaults."""
    arguments = []
    for key, value in values.items():
        if isinstance(value, (list, dict)):
            if type(value).__name__ not in str(known[key]):
                raise CommandError(f"{key} must be a single value, but is {value!r}")
            if "list[str]" in str(known[key]) and not all(isinstance(item, str) for item in value):
                raise CommandError(f"{key} must be a list of text, but is {value!r}")
            parser.set_defaults(**{key: value})
        elif value is not None:
            arguments.append(f"--{key}={value}")
    return arguments


def _read_options(path: Path, known: Mapping[str, Any]) -> dict[str, Any]:
    values, words = read_with_words(path, "--config")
    for key in values:
        if key not in known:
            raise CommandError(f"--config {path}: {_unknown(str(key), known)}")
    # YAML takes a bare no for False and 0123 for 83, but where text is meant they are words: as they were written.
    return {key: words.get(key, value) if _is_misread(value, known[key]) else value for key, value in values.items()}


def _is_misread(value: Any, hint: Any) -> bool:
    is_single = not isinstance(value, (str, list, dict, type(None)))
    return is_single and type(value) not in (get_args(hint) or (hint,))


def _unknown(name: str, known: Iterable[str]) -> str:
    name = name.partition("=")[0]
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"there is no option {name!r}" + (f"; did you mean {close[0]!r}?" if close else "")
