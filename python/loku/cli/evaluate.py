"""``loku evaluate``: a benchmark, or the perplexity of a text."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.table import Table

from loku.cli.benchmarks import measure_tofu, sequences_of, tofu_log, tofu_sources
from loku.cli.data import Tokenised
from loku.cli.errors import CommandError, blaming
from loku.cli.models import load_model, load_tokenizer
from loku.cli.options import DataOptions, ModelOptions, as_dict, option, parse
from loku.cli.run_folder import RunFolder
from loku.evaluation import (
    aggregate_tofu,
    evaluate_tdec,
    lm_eval_tasks,
    perplexity,
    write_log,
)


@dataclass
class EvaluateRun:
    """What to measure."""

    benchmark: Literal["tofu", "tdec", "perplexity", "lm-eval"] = option("perplexity", "what to measure")
    forget: str | None = option(None, "tofu: forget01, forget05 or forget10; tdec: the sequences, such as tdec[0:32]")
    text: list[str] | None = option(None, "perplexity: sources, each measured by itself")
    retain_log: str | None = option(None, "tofu: log of the model trained without the forget set, for forget quality")
    definition: Literal["tofu", "open-unlearning"] = option("tofu", "whose definition of TOFU's aggregates")
    limit: int | None = option(300, "tofu: most samples of each task; 300 as published")
    output_dir: str = option("evaluation", "folder for results.json, and TOFU's log")


def main(argv: list[str]) -> None:
    """Measure a model, with an adapter on it where one is given."""
    options = parse("evaluate", [ModelOptions, DataOptions, EvaluateRun], argv, main.__doc__)
    model_options, data_options, evaluate = options
    measure = _MEASURES[evaluate.benchmark]
    run = RunFolder(evaluate.output_dir)
    tokenizer, model = load_tokenizer(model_options), load_model(model_options)
    sources = Tokenised.of(data_options, tokenizer, model)
    metrics = measure(model, sources, evaluate, run.path)
    run.begin(as_dict(*options))
    run.write_results({"after": metrics})
    table = Table("metric", "value")
    for name, value in metrics.items():
        table.add_row(name, "" if value is None else f"{value:.5g}")
    Console().print(table)


def _tofu(model, sources: Tokenised, evaluate: EvaluateRun, folder: Path) -> dict[str, float | None]:
    splits = tofu_sources(evaluate.forget, sources)
    retain_log = None if evaluate.retain_log is None else tofu_log(evaluate.retain_log)
    log = measure_tofu(model, sources, splits, evaluate.limit, show_progress_bar=True)
    write_log(log, folder / "eval_log_aggregated.json")
    with blaming(f"--retain_log {evaluate.retain_log}"):
        return aggregate_tofu(log, retain_log, evaluate.definition)


def _tdec(model, sources: Tokenised, evaluate: EvaluateRun, folder: Path) -> dict[str, float]:
    if evaluate.forget is None:
        raise CommandError("--forget is required: the sequences, such as tdec[0:32]")
    sequences = sequences_of(sources.examples(evaluate.forget), evaluate.forget)
    return evaluate_tdec(model, sequences, show_progress_bar=True)


def _perplexity(model, sources: Tokenised, evaluate: EvaluateRun, folder: Path) -> dict[str, float]:
    if not evaluate.text:
        raise CommandError("--text is required: sources such as wikitext2:test")
    return {
        f"{source} perplexity": perplexity(model, sources.examples(source), show_progress_bar=True)
        for source in evaluate.text
    }


def _lm_eval(model, sources: Tokenised, evaluate: EvaluateRun, folder: Path) -> dict[str, float]:
    with blaming(None, ImportError):
        return lm_eval_tasks(model, sources.tokenizer)


_MEASURES = {"tofu": _tofu, "tdec": _tdec, "perplexity": _perplexity, "lm-eval": _lm_eval}
