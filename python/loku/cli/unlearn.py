"""``loku unlearn``: a model, what it must forget and what it must keep, to an adapter and evidence."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from accelerate.utils import broadcast_object_list
from peft import PeftModel, get_peft_model
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedModel, set_seed

from loku.cli.benchmarks import Benchmark, BenchmarkOptions
from loku.cli.checks import check_optimizer, check_training
from loku.cli.data import Tokenised, count_shared
from loku.cli.errors import CommandError, blaming, warn
from loku.cli.importance import check_importance, fila_config, row_weights
from loku.cli.models import held_whole, load_model, load_tokenizer, lora_config
from loku.cli.options import (
    AdapterOptions,
    DataOptions,
    ImportanceOptions,
    ModelOptions,
    as_dict,
    option,
    parse,
)
from loku.cli.run_folder import TRAINING_SETTLED, RunFolder, costs_of
from loku.data import Example, Role
from loku.fila import FilaStateDict, initialize_lora_fila_weights, save_fila_adapter
from loku.fila.stored_form import has_fila
from loku.files import filling
from loku.report import Run, summary_table, write_report
from loku.training import EvaluationCallback, JsonLinesCallback, UnlearnConfig, UnlearningTrainer, last_whole_checkpoint

# Where files are, when they are written and how a run starts may change when it goes on.
_WHERE = {"data_dir", "fisher_save_minutes", "importance", "resume"}


@dataclass
class UnlearnRun:
    """What to forget and what to keep."""

    forget: str | None = option(None, "source of what must be forgotten: a TOFU split, tdec[0:32], or a .jsonl file")
    retain: str | None = option(None, "source of what must be kept")
    refusals: str | None = option(None, "dpo: text file of answers that decline, one a line")
    resume: bool = option(False, "go on from the last checkpoint in output_dir")


@dataclass
class Data:
    """Tokenised examples by role."""

    forget: list[Example]
    retain: list[Example] | None
    preferred: list[Example] | None


def main(argv: list[str]) -> None:
    """Make a model forget one data set and keep another; writes a LoRA adapter for the unmodified model, and a report.

    The model given, with --adapter merged into it, is the one that has memorised what must be forgotten. `adapter` in
    the run's folder loads with PeftModel.from_pretrained on it; `loku export --format merged` takes both adapters.
    """
    types = [
        ModelOptions, DataOptions, AdapterOptions, ImportanceOptions, BenchmarkOptions, UnlearnRun, UnlearnConfig
    ]  # fmt: skip
    options = parse("unlearn", types, argv, main.__doc__)
    model_options, data_options, adapter, importance, benchmark_options, unlearn, args = options
    if importance.importance is not None:
        importance.importance = os.path.abspath(importance.importance)  # one file by one name, in reports too
    method = args.unlearning_method()
    measured = method.fila and importance.importance is None  # which compares the two sets, whatever the loss does
    _check_sources(unlearn, (*method.roles, Role.RETAIN) if measured else method.roles)
    check_training(args, unlearn.resume)
    outputs = ("adapter", "checkpoint-*", "report")
    run = RunFolder(args.output_dir, unlearn.resume, args.process_index == 0, outputs, model_options)

    set_seed(args.seed)
    tokenizer = load_tokenizer(model_options)
    with held_whole(args):
        model = load_model(model_options)
    check_optimizer(args, model)
    sources = Tokenised.of(data_options, tokenizer, model)
    data = _load(sources, unlearn, method.roles, args.seed)
    if run.writes:
        _warn_of_shared(data)
    lora = lora_config(model, adapter)
    benchmark = Benchmark(benchmark_options, sources, unlearn.forget, unlearn.retain, model)
    settled = as_dict(model_options, data_options, adapter, importance, unlearn)
    run.begin(as_dict(*options), [*settled.keys() - _WHERE, *TRAINING_SETTLED])
    state = _row_weights(run, model, data, adapter, importance, args) if method.fila else None
    with blaming():
        model = get_peft_model(model, lora)
    costs = {}
    if state is not None:
        started = time.perf_counter()
        with blaming(importance.importance and f"--importance {importance.importance}"):
            initialize_lora_fila_weights(
                model, state, config=fila_config(importance), show_progress_bar=not args.disable_tqdm
            )
        costs = {"importance_seconds": state.importance.get("seconds", 0.0)}
        costs["initialisation_seconds"] = round(time.perf_counter() - started, 3)
    args.include_num_input_tokens_seen = "non_padding"  # which the command line cannot say
    with blaming():
        trainer = UnlearningTrainer(
            model=model,
            args=args,
            forget_dataset=data.forget,
            retain_dataset=data.retain,
            preferred_dataset=data.preferred,
            processing_class=tokenizer,
            callbacks=[
                JsonLinesCallback(run / "metrics.jsonl"),
                EvaluationCallback(benchmark.evaluate, benchmark.every, benchmark.reached),
            ],
        )
    trainer.train(resume_from_checkpoint=last_whole_checkpoint(run.path) if unlearn.resume else None)
    state_dict = trainer.gathered_state_dict()
    if trainer.is_world_process_zero():
        save_adapter(model, run / "adapter", state_dict)
    # Every process measures what is missing of what the one that writes has logged: a sharded model takes them all.
    # The results of an earlier end, before the run was given more epochs, are of another adapter.
    (logged,) = broadcast_object_list([Run.load(run.path).last_evaluation if trainer.is_world_process_zero() else None])
    after = benchmark.complete(trainer.model, logged)
    if trainer.is_world_process_zero():
        _finish(run, after, benchmark.thresholds, trainer, costs)


def save_adapter(model: PeftModel, path: Path, state_dict: Mapping[str, Tensor] | None = None) -> None:
    """For ``PeftModel.from_pretrained`` on the unmodified base model, whatever the method."""
    if has_fila(model):
        save_fila_adapter(model, path, state_dict=state_dict)
    else:
        with filling(path) as folder:
            model.save_pretrained(folder, state_dict=state_dict)


def _check_sources(unlearn: UnlearnRun, roles: tuple[Role, ...]) -> None:
    for role, source, name in ((Role.FORGET, unlearn.forget, "forget"), (Role.RETAIN, unlearn.retain, "retain")):
        if role in roles and source is None:
            raise CommandError(f"--{name} is required by this method: a TOFU split, tdec[0:32], or a .jsonl file")


def _load(sources: Tokenised, unlearn: UnlearnRun, roles: tuple[Role, ...], seed: int) -> Data:
    return Data(
        forget=sources.examples(unlearn.forget),
        retain=None if unlearn.retain is None else sources.examples(unlearn.retain),
        preferred=sources.refusals(unlearn.forget, unlearn.refusals, seed) if Role.PREFERRED in roles else None,
    )


def _warn_of_shared(data: Data) -> None:
    shared = count_shared(data.forget, data.retain or [])
    if shared:
        warn(f"{shared} of the {len(data.forget)} sequences of --forget are also among those of --retain")


def _row_weights(
    run: RunFolder,
    model: PreTrainedModel,
    data: Data,
    adapter: AdapterOptions,
    options: ImportanceOptions,
    args: UnlearnConfig,
) -> FilaStateDict:
    """From the file given, or from an earlier start of this run, or computed and kept."""
    if options.importance is None:
        path = run / "importance.safetensors"
        return row_weights(model, data.forget, data.retain, adapter, options, args.seed, path, not args.disable_tqdm)
    if not Path(options.importance).is_file():
        raise CommandError(f"--importance {options.importance} is no file; `loku importance` writes one")
    with blaming(f"--importance {options.importance}"):
        state = FilaStateDict.load(options.importance)
        check_importance(state, options, data.forget)
    return state


def _finish(
    run: RunFolder,
    after: Mapping[str, float],
    thresholds: Mapping[str, float],
    trainer: UnlearningTrainer,
    costs: Mapping[str, float],
) -> None:
    measured = Run.load(run.path)
    after = {**dict.fromkeys(measured.not_finite, math.nan), **after}
    results = {"before": measured.before, "after": after, "thresholds": thresholds}
    run.write_results({**results, **costs_of(measured, trainer.state, costs)})
    finished = Run.load(run.path)
    write_report([finished], run / "report")
    Console().print(summary_table([finished]))
