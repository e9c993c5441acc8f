"""``loku evaluate``: a benchmark, or the perplexity of a text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedModel, set_seed

from loku.cli.benchmarks import Questions, measure_tofu, sequences_of, tofu_log, tofu_sources
from loku.cli.data import Tokenised
from loku.cli.errors import CommandError, blaming
from loku.cli.models import load_model, load_tokenizer
from loku.cli.options import DataOptions, ModelOptions, as_dict, option, parse
from loku.cli.run_folder import RunFolder
from loku.evaluation import (
    NINE_TASKS,
    aggregate_tofu,
    extraction_likelihood,
    lm_eval_tasks,
    memorization_accuracy,
    perplexity,
)
from loku.evaluation.greedy import check_cache
from loku.evaluation.harness import import_lm_eval

_SEQUENCES = 32  # measured between two writings
_WHERE = {"data_dir", "output_dir", "resume", "retain_log"}  # may change when a run goes on


@dataclass
class EvaluateRun:
    """What to measure."""

    benchmark: Literal["tofu", "tdec", "perplexity", "lm-eval"] = option(
        "perplexity", "what to measure; perplexity: of questions also the ROUGE-L recall of the answers"
    )
    forget: str | None = option(None, "tofu: forget01, forget05 or forget10; tdec: sequences, such as tdec[0:32]")
    text: list[str] | None = option(None, "perplexity: sources, each measured by itself")
    retain_log: str | None = option(None, "tofu: log of the model trained without the forget set, for forget quality")
    definition: Literal["tofu", "open-unlearning"] = option("tofu", "whose definition of TOFU's aggregates")
    limit: int | None = option(300, "most samples of each TOFU task, 300 as published, and most questions asked")
    seed: int = option(0, "of what is drawn at random: only tasks of lm-eval may do so")
    output_dir: str = option("evaluation", "folder for results.json, metrics.jsonl, and TOFU's log")
    resume: bool = option(False, "go on from what is in output_dir")


def main(argv: list[str]) -> None:
    """Measure a model, with an adapter on it where one is given."""
    options = parse("evaluate", [ModelOptions, DataOptions, EvaluateRun], argv, main.__doc__)
    model_options, data_options, evaluate = options
    run = RunFolder(evaluate.output_dir, evaluate.resume)
    set_seed(evaluate.seed)
    tokenizer, model = load_tokenizer(model_options), load_model(model_options)
    sources = Tokenised.of(data_options, tokenizer, model)
    measure = _MEASURES[evaluate.benchmark](model, sources, evaluate, run)
    config = as_dict(*options)
    run.begin(config, config.keys() - _WHERE)
    metrics = measure()
    run.write_results({"after": metrics})
    table = Table("metric", "value")
    for name, value in metrics.items():
        table.add_row(Text(name), "" if value is None else f"{value:.5g}")
    Console().print(table)


Measure = Callable[[], dict[str, float | None]]


def _tofu(model: PreTrainedModel, sources: Tokenised, evaluate: EvaluateRun, run: RunFolder) -> Measure:
    splits = tofu_sources(evaluate.forget, sources)
    retain_log = None if evaluate.retain_log is None else tofu_log(evaluate.retain_log)

    def measure() -> dict[str, float | None]:
        output = run / "eval_log_aggregated.json"
        log = measure_tofu(model, sources, splits, evaluate.limit, output, show_progress_bar=True)
        with blaming(f"--retain_log {evaluate.retain_log}"):
            return aggregate_tofu(log, retain_log, evaluate.definition)

    return measure


def _tdec(model: PreTrainedModel, sources: Tokenised, evaluate: EvaluateRun, run: RunFolder) -> Measure:
    if evaluate.forget is None:
        raise CommandError("--forget is required: the sequences, such as tdec[0:32]")
    with blaming("--benchmark tdec"):
        check_cache(model)
    sequences = sequences_of(sources.examples(evaluate.forget), evaluate.forget)

    def measure() -> dict[str, float]:
        for begin in range(len(run.lines()), len(sequences), _SEQUENCES):
            part = sequences[begin : begin + _SEQUENCES]
            accuracies = memorization_accuracy(model, part).tolist()
            likelihoods = extraction_likelihood(model, part, show_progress_bar=True).tolist()
            for ma, el in zip(accuracies, likelihoods, strict=True):
                run.add_line({"ma": ma, "el_10": el})
        return {name: fmean(line[name] for line in run.lines()) for name in ("ma", "el_10")}

    return measure


def _perplexity(model: PreTrainedModel, sources: Tokenised, evaluate: EvaluateRun, run: RunFolder) -> Measure:
    if not evaluate.text:
        raise CommandError("--text is required: sources such as wikitext2:test")

    measures: dict[str, Callable[[], float]] = {}
    for source in evaluate.text:
        examples = sources.examples(source)
        measures[f"{source} perplexity"] = partial(perplexity, model, examples, show_progress_bar=True)
        questions = Questions.of(sources.records(source)[: evaluate.limit], sources, source)
        if questions.records:
            measures[f"{source} ROUGE-L"] = partial(questions.rouge, model, sources)
    return lambda: _each(list(measures), lambda name: measures[name](), run)


def _lm_eval(model: PreTrainedModel, sources: Tokenised, evaluate: EvaluateRun, run: RunFolder) -> Measure:
    with blaming(None, ImportError):
        import_lm_eval()

    def accuracy(task: str) -> float:
        return lm_eval_tasks(model, sources.tokenizer, [task], seed=evaluate.seed)[task]

    return lambda: _each(NINE_TASKS, accuracy, run)


def _each(names: Sequence[str], measure: Callable[[str], float], run: RunFolder) -> dict[str, float]:
    """Name -> value, a line each in the run's metrics; what has its line is not measured again."""
    found = {line["name"]: line["value"] for line in run.lines()}
    for name in names:
        if name not in found:
            found[name] = measure(name)
            run.add_line({"name": name, "value": found[name]})
    return found


_MEASURES = {"tofu": _tofu, "tdec": _tdec, "perplexity": _perplexity, "lm-eval": _lm_eval}
