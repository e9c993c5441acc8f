"""``loku importance``: how much each row of each weight matters for the forget set relative to the retain set."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import PartialState
from torch import Tensor
from transformers import PreTrainedModel

from loku.cli.data import Tokenised, digest, importance_batches
from loku.cli.errors import CommandError, blaming, warn
from loku.cli.models import load_model, load_tokenizer, lora_config
from loku.cli.options import (
    AdapterOptions,
    DataOptions,
    ImportanceOptions,
    ModelOptions,
    as_dict,
    option,
    parse,
)
from loku.cli.run_folder import RunFolder
from loku.data import Example
from loku.fila import FilaConfig, FilaStateDict, ImportanceCheckpoint, get_fila_state_dict
from loku.fila.checkpoint import rank_and_ranks
from loku.files import write_json_lines

_WHERE = {"data_dir", "fisher_save_minutes", "importance", "output_dir", "resume"}  # may change when a run goes on


@dataclass
class ImportanceRun:
    """What to compare, and where to."""

    forget: str | None = option(None, "source of what must be forgotten: a TOFU split, tdec[0:32], or a .jsonl file")
    retain: str | None = option(None, "source of what must be kept")
    output_dir: str = option("importance", "folder for importance.safetensors, and a line a module in metrics.jsonl")
    seed: int = option(0, "which retain examples are drawn")
    resume: bool = option(False, "go on from what is in output_dir")


def fila_config(options: ImportanceOptions) -> FilaConfig:
    with blaming():
        return FilaConfig(
            mode=options.fila_mode,
            eps=options.fila_eps,
            eps_mode=options.fila_eps_mode,
            granularity=options.fisher_granularity,
            memory_budget=options.fisher_memory_budget,
        )


def row_weights(
    model: PreTrainedModel,
    forget: list[Example],
    retain: list[Example],
    adapter: AdapterOptions,
    options: ImportanceOptions,
    seed: int,
    path: Path,
    show_progress_bar: bool = True,
) -> FilaStateDict:
    """The importance pass on the base model, to ``path``; under torch.distributed each rank takes its share of the
    batches. Where an earlier start of the run has come to its end, what that found.

    Kept with the row weights, in ``importance``: the seconds that it takes, those of its last start, and which the
    two sets were.

    Raises CommandError if they were others.
    """
    started = time.perf_counter()
    sets = {"forget": digest([forget]), "retain": digest([retain])}
    if path.exists():
        return _earlier_row_weights(path, sets)
    data = importance_batches(forget, retain, options.fisher_retain_size, options.fisher_batch_tokens, seed)
    checkpoint = ImportanceCheckpoint(
        path.with_name(f"{path.stem}-begun.safetensors"), 60 * options.fisher_save_minutes, digest(data)
    )
    rank, ranks = rank_and_ranks()
    # Where a rank would be left without any, all do all of it: F is a mean, so that is the same.
    data = tuple(batches[rank::ranks] if len(batches) >= ranks else batches for batches in data)
    peft_config = lora_config(model, adapter)
    settings = {"peft_config": peft_config, "show_progress_bar": show_progress_bar, "checkpoint": checkpoint}
    with blaming("importance", FloatingPointError):  # gradients that are not finite, or zero throughout
        state = get_fila_state_dict(model, *data, fila_config(options), **settings)
    state.importance |= {**sets, "seconds": round(time.perf_counter() - started, 3)}
    if PartialState().is_main_process:
        state.save(path)
        checkpoint.remove()
    return state


def _earlier_row_weights(path: Path, sets: Mapping[str, str]) -> FilaStateDict:
    """Raises CommandError unless they are of these sets, {name: digest}."""
    with blaming(str(path)):
        state = FilaStateDict.load(path)
    for name, found in sets.items():
        if state.importance.get(name) not in (None, found):
            raise CommandError(
                f"{path}, of an earlier start of the run, is not for what --{name} holds now: choose another "
                "--output_dir"
            )
    return state


def check_importance(state: FilaStateDict, options: ImportanceOptions, forget: list[Example]) -> None:
    """Raises ValueError if row weights from a file were computed otherwise than ``options`` say, and warns of those for
    another forget set."""
    asked = {"fila_eps": "eps", "fila_eps_mode": "eps_mode", "fisher_granularity": "granularity"}
    for key, name in asked.items():
        used = state.importance.get(name, getattr(options, key))
        if used != getattr(options, key):
            raise ValueError(f"--{key} was {used} when it was computed, but is {getattr(options, key)} here")
    if state.importance.get("forget") not in (None, digest([forget])):
        warn(f"--importance {options.importance} was computed for another forget set than --forget")


def main(argv: list[str]) -> None:
    """Compute F_forget and F_retain of a model, and write sqrt(sum_j F_forget / (eps + F_retain)) of every row."""
    types = [ModelOptions, DataOptions, AdapterOptions, ImportanceOptions, ImportanceRun]
    parsed = parse("importance", types, argv, main.__doc__)
    model_options, data, adapter, options, asked = parsed
    for name in ("forget", "retain"):
        if getattr(asked, name) is None:
            raise CommandError(f"--{name} is required: a TOFU split, tdec[0:32], or a .jsonl file")
    first = PartialState(cpu=not torch.cuda.is_available()).is_main_process  # of torchrun's processes, who now can talk
    run = RunFolder(asked.output_dir, asked.resume, writes=first)
    tokenizer, model = load_tokenizer(model_options), load_model(model_options)
    sources = Tokenised.of(data, tokenizer, model)
    forget, retain = sources.examples(asked.forget), sources.examples(asked.retain)
    config = as_dict(*parsed)
    run.begin(config, config.keys() - _WHERE)
    path = run / "importance.safetensors"
    state = row_weights(model, forget, retain, adapter, options, asked.seed, path, first)
    if first:
        write_json_lines(run / "metrics.jsonl", map(_line, state.items()))
        run.write_results({"modules": len(state), "seconds": state.importance["seconds"]})
        print(f"row weights of {len(state)} modules written to {path}")


def _line(item: tuple[str, Tensor]) -> dict[str, object]:
    """What the weights of a module's rows are like."""
    name, weights = item
    spread = {"least": weights.min(), "median": weights.median(), "largest": weights.max()}
    return {"module": name, "rows": len(weights), **{which: float(value) for which, value in spread.items()}}
