"""``loku importance``: how much each row of each weight matters for the forget set relative to the retain set."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import PartialState
from torch import distributed
from transformers import PreTrainedModel

from loku.cli.data import Tokenised, importance_batches
from loku.cli.errors import CommandError, blaming
from loku.cli.models import load_model, load_tokenizer, lora_config
from loku.cli.options import (
    AdapterOptions,
    DataOptions,
    ImportanceOptions,
    ModelOptions,
    option,
    parse,
)
from loku.data import Example
from loku.fila import FilaConfig, FilaStateDict, get_fila_state_dict


@dataclass
class ImportanceRun:
    """What to compare, and where to."""

    forget: str | None = option(None, "source of what must be forgotten: a TOFU split, tdec[0:32], or a .jsonl file")
    retain: str | None = option(None, "source of what must be kept")
    output: str = option("importance.safetensors", "file of row weights to write")
    seed: int = option(0, "which retain examples are drawn")


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
    pad: int,
    seed: int,
    show_progress_bar: bool = True,
) -> FilaStateDict:
    """The importance pass on the base model; under torch.distributed each rank takes its share of the batches.

    The seconds that it takes are kept with the row weights, in ``importance["seconds"]``.
    """
    started = time.perf_counter()
    data = importance_batches(forget, retain, options.fisher_retain_size, options.fisher_batch_tokens, pad, seed)
    if distributed.is_available() and distributed.is_initialized():
        rank, ranks = distributed.get_rank(), distributed.get_world_size()
        # Where a rank would be left without any, all do all of it: F is a mean, so that is the same.
        data = tuple(batches[rank::ranks] if len(batches) >= ranks else batches for batches in data)
    peft_config = lora_config(model, adapter)
    with blaming("importance", FloatingPointError):  # gradients that are not finite, or zero throughout
        state = get_fila_state_dict(
            model, *data, fila_config(options), peft_config=peft_config, show_progress_bar=show_progress_bar
        )
    state.importance["seconds"] = round(time.perf_counter() - started, 3)
    return state


def main(argv: list[str]) -> None:
    """Compute F_forget and F_retain of a model, and write sqrt(sum_j F_forget / (eps + F_retain)) of every row."""
    types = [ModelOptions, DataOptions, AdapterOptions, ImportanceOptions, ImportanceRun]
    model_options, data, adapter, options, run = parse("importance", types, argv, main.__doc__)
    for name in ("forget", "retain"):
        if getattr(run, name) is None:
            raise CommandError(f"--{name} is required: a TOFU split, tdec[0:32], or a .jsonl file")
    first = PartialState(cpu=not torch.cuda.is_available()).is_main_process  # of torchrun's processes, who now can talk
    tokenizer, model = load_tokenizer(model_options), load_model(model_options)
    sources = Tokenised.of(data, tokenizer, model)
    forget, retain = sources.examples(run.forget), sources.examples(run.retain)
    state = row_weights(model, forget, retain, adapter, options, tokenizer.pad_token_id, run.seed, first)
    if first:
        state.save(run.output)
        print(f"row weights of {len(state)} modules written to {Path(run.output)}")
