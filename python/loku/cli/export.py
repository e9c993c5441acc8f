"""``loku export``: an adapter for the unmodified base model, or merged weights."""

from __future__ import annotations

import hashlib
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from transformers import set_seed

from loku.cli.errors import CommandError, warn
from loku.cli.models import load_model, load_tokenizer
from loku.cli.options import ModelOptions, as_dict, option, parse
from loku.cli.run_folder import RunFolder
from loku.cli.settings_files import read_mapping
from loku.files import filling, write_json_lines

_ADAPTER_FILES = ("adapter_model.safetensors", "adapter_config.json", "README.md")
_OUTPUTS = {  # what could be replaced: of tokenizers too
    "adapter": _ADAPTER_FILES,
    "merged": ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model"),
}
_WHERE = {"output_dir", "resume"}  # may change when a run goes on


@dataclass
class ExportRun:
    """What to write, and where."""

    format: Literal["adapter", "merged"] = option("adapter", "a plain LoRA adapter, or the model with it merged in")
    output_dir: str = option("export", "folder to write")
    seed: int = option(0, "of weights that the model's files lack, which are drawn at random")
    resume: bool = option(False, "leave what is in output_dir if it is whole, by its SHA-256; write it anew if not")


def main(argv: list[str]) -> None:
    """Write what `loku unlearn` trained (--adapter: its run's folder `adapter`, or a checkpoint) for use without loku.

    `adapter`: the files that PeftModel.from_pretrained loads on the unmodified base model. `merged`: the model's
    weights with the adapter in them, and the tokenizer, for AutoModelForCausalLM.from_pretrained. Beside either, what
    made it, and a line a file in metrics.jsonl: its size and SHA-256. Where unlearning began from an adapter, the run's
    own belongs on top of it: give both, --format merged --adapter memorised run/adapter.
    """
    model_options, export = parse("export", [ModelOptions, ExportRun], argv, main.__doc__)
    if model_options.adapter is None:
        raise CommandError("--adapter is required: the folder `adapter` of a run, or one of its checkpoints")
    if export.format == "adapter" and len(model_options.adapter) > 1:
        raise CommandError(
            f"--format adapter takes one --adapter, but {len(model_options.adapter)} were given: "
            f"{model_options.adapter[-1]} belongs on top of those before it, which it does not hold; --format merged "
            "writes all of them"
        )
    source = Path(model_options.adapter[-1])
    if not (source / "adapter_model.safetensors").is_file():
        raise CommandError(f"--adapter {source} holds no adapter_model.safetensors")
    _check_stack(source, model_options.adapter, export.format)
    run = RunFolder(export.output_dir, export.resume, outputs=_OUTPUTS[export.format], source=model_options)
    config = as_dict(model_options, export)
    run.begin(config, config.keys() - _WHERE)
    if not _is_whole(run):
        started = time.perf_counter()
        set_seed(export.seed)
        merged = [load_model(model_options), load_tokenizer(model_options)] if export.format == "merged" else []
        with filling(run.path) as folder:
            for part in merged:
                part.save_pretrained(folder)
            if not merged:
                _copy_adapter(source, folder)
            lines = [_line(file) for file in sorted(folder.iterdir())]
        write_json_lines(run / "metrics.jsonl", lines)
        total = sum(line["bytes"] for line in lines)
        run.write_results({"bytes": total, "seconds": round(time.perf_counter() - started, 3)})
    print(f"{export.format} written to {run.path}")


def _check_stack(source: Path, adapters: list[str], kind: str) -> None:
    """Of a run that began from other adapters: without them what they removed would be back, without a word."""
    record = source.parent / "config.yaml"
    earlier = read_mapping(record, "the run's").get("adapter") or [] if record.is_file() else []
    given = {Path(adapter).resolve() for adapter in adapters}
    missing = [adapter for adapter in earlier if Path(adapter).resolve() not in given]
    if not missing:
        return
    if kind == "merged":
        raise CommandError(
            f"--adapter {source} belongs on top of those that its run began from, but {', '.join(missing)} is not given"
        )
    warn(f"{source} belongs on top of the adapters that its run began from: {', '.join(missing)}")


def _copy_adapter(source: Path, folder: Path) -> None:
    for name in _ADAPTER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def _is_whole(run: RunFolder) -> bool:
    """Whether every file that was written is there as it was."""
    files = {run / line["file"]: line for line in run.lines()}
    return bool(files) and all(file.is_file() and _line(file) == line for file, line in files.items())


def _line(file: Path) -> dict[str, Any]:
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return {"file": file.name, "bytes": file.stat().st_size, "sha256": digest}
