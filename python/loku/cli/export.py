"""``loku export``: an adapter for the unmodified base model, or merged weights."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from loku.cli.errors import CommandError
from loku.cli.models import load_model, load_tokenizer
from loku.cli.options import ModelOptions, as_dict, option, parse
from loku.cli.run_folder import describe
from loku.files import filling

_ADAPTER_FILES = ("adapter_model.safetensors", "adapter_config.json", "README.md")


@dataclass
class ExportRun:
    """What to write, and where."""

    format: Literal["adapter", "merged"] = option("adapter", "a plain LoRA adapter, or the model with it merged in")
    output: str = option("export", "folder to write")


def main(argv: list[str]) -> None:
    """Write what `loku unlearn` trained (--adapter: its run's folder `adapter`, or a checkpoint) for use without loku.

    `adapter`: the files that PeftModel.from_pretrained loads on the unmodified base model. `merged`: the model's
    weights with the adapter in them, and the tokenizer, for AutoModelForCausalLM.from_pretrained. Beside either, what
    made it: config.yaml and versions.json. Where unlearning began from an adapter, give that one first: --adapter
    memorised run/adapter.

    Nothing is drawn at random, and nothing is written before all of it is: a run that is broken off begins anew.
    """
    model_options, run = parse("export", [ModelOptions, ExportRun], argv, main.__doc__)
    if model_options.adapter is None:
        raise CommandError("--adapter is required: the folder `adapter` of a run, or one of its checkpoints")
    source = Path(model_options.adapter[-1])
    if not (source / "adapter_model.safetensors").is_file():
        raise CommandError(f"--adapter {source} holds no adapter_model.safetensors")
    whole = [load_model(model_options), load_tokenizer(model_options)] if run.format == "merged" else []
    with filling(run.output) as folder:
        for part in whole:
            part.save_pretrained(folder)
        if run.format == "adapter":
            _copy_adapter(source, folder)
        describe(folder, as_dict(model_options, run))
    print(f"{run.format} written to {run.output}")


def _copy_adapter(source: Path, folder: Path) -> None:
    for name in _ADAPTER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
