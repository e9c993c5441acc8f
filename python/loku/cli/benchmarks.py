"""What an unlearning run measures of the model as it goes, and when it may stop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import torch
from torch import Tensor, nn

from loku.cli.data import Tokenised
from loku.cli.errors import CommandError, blaming
from loku.cli.options import option
from loku.data import TOFU_SPLITS, Example, is_question
from loku.evaluation import (
    TdecThresholds,
    TofuLog,
    aggregate_tofu,
    evaluate_tdec,
    evaluate_tofu,
    extraction_likelihood,
    generate_greedily,
    perplexity,
    read_log,
    rouge_recall,
    sequence_losses,
    tdec_thresholds,
)
from loku.evaluation.greedy import check_cache
from loku.evaluation.tofu import SOURCES

TOFU_FORGET_SPLITS = ("forget01", "forget05", "forget10")
TOFU_LENGTH = 200  # most tokens of a question with its generated answer, as published


@dataclass
class BenchmarkOptions:
    """What is measured at the start, along the way, and at the end."""

    benchmark: Literal["none", "tdec", "tofu"] = option("none", "besides the losses on forget and retain set")
    evaluate_every: str = option("epoch", "epoch, or a number of steps")
    limit: int = option(300, "most samples of --forget, --retain and each TOFU task; 300 as published with TOFU")
    text: str | None = option(None, "source whose perplexity is measured, such as wikitext2:validation")
    unseen: str | None = option(None, "tdec: sequences never trained on, whose EL_10 and MA are the goal: tdec[32:64]")
    el_threshold: float | None = option(None, "tdec: the goal for EL_10, where it is not measured on --unseen")
    ma_threshold: float | None = option(None, "tdec: the goal for MA, likewise")
    retain_log: str | None = option(None, "tofu: log of the model trained without the forget set, for forget quality")


@dataclass(frozen=True)
class Questions:
    """Those of a source's records that are questions, and the most tokens of one with its generated answer."""

    records: list[dict[str, Any]]
    length: int

    @classmethod
    def of(cls, records: Sequence[dict[str, Any]], sources: Tokenised, source: str) -> Questions:
        """TOFU's length was published for its own splits; other answers may take as many tokens as the true ones."""
        questions = [record for record in records if is_question(record)]
        if source.partition("[")[0] in TOFU_SPLITS:
            return cls(questions, min(TOFU_LENGTH, sources.max_length))
        lengths = [len(example["input_ids"]) for example in sources.tokenise(questions, source)]
        return cls(questions, max(lengths, default=0))

    def rouge(self, model: nn.Module, sources: Tokenised) -> float:
        """Mean ROUGE-L recall of the greedy answers."""
        prompts = [sources.prompt.question(record["question"]) for record in self.records]
        found = generate_greedily(model, sources.tokenizer, prompts, max_length=self.length)
        return fmean(rouge_recall(found, [record["answer"] for record in self.records])["rougeL_recall"])


class Benchmark:
    """Metrics of a model by name, and whether they say that it has forgotten.

    Always: mean loss of forget and retain examples (nats a token), and where some of their records are questions, the
    ROUGE-L recall of the greedy answers to those. For ``tdec`` also MA and EL_10 of the forget sequences, for ``tofu``
    model utility, forget quality and their parts.

    Raises:
        CommandError: an option that the benchmark needs is missing, or does not fit it.
    """

    def __init__(
        self, options: BenchmarkOptions, sources: Tokenised, forget: str, retain: str | None, model: nn.Module
    ) -> None:
        self.options, self.sources, self.forget = options, sources, forget
        named = {"forget": forget} if retain is None else {"forget": forget, "retain": retain}
        records = {part: sources.records(source)[: options.limit] for part, source in named.items()}
        self.examples = {part: sources.tokenise(records[part], named[part]) for part in named}
        self.questions = {part: Questions.of(records[part], sources, named[part]) for part in named}
        self.text = None if options.text is None else sources.examples(options.text)
        self.retain_log = None if options.retain_log is None else tofu_log(options.retain_log)
        self.goal = None
        if options.benchmark == "tdec":
            with blaming("--benchmark tdec"):
                check_cache(model)
            self.sequences = sequences_of(self.examples["forget"], forget)
            self.goal, self.first = self._goal(model), True
        elif options.benchmark == "tofu":
            self.splits = tofu_sources(forget, sources)

    @property
    def every(self) -> str | int:
        every = self.options.evaluate_every
        return every if every == "epoch" else int(every)

    @property
    def thresholds(self) -> dict[str, float]:
        if self.goal is None:
            return {}
        return {"el_10": self.goal.extraction_likelihood, "ma": self.goal.memorization_accuracy}

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        metrics = {}
        for part, examples in self.examples.items():
            metrics[f"{part}_loss"] = sequence_losses(model, examples).mean.mean().item()
            if self.questions[part].records:
                metrics[f"{part}_rouge"] = self.questions[part].rouge(model, self.sources)
        if self.text is not None:
            metrics["perplexity"] = perplexity(model, self.text)
        if self.options.benchmark == "tdec":
            metrics |= self._tdec(model)
        elif self.options.benchmark == "tofu":
            metrics |= self._tofu(model)
        return metrics

    def complete(self, model: nn.Module, metrics: Mapping[str, float]) -> dict[str, float]:
        """The metrics of the model as it is now, with EL_10 where it was put off."""
        if self.options.benchmark != "tdec" or "el_10" in metrics:
            return dict(metrics)
        return {**metrics, "el_10": extraction_likelihood(model, self.sequences).mean().item()}

    def reached(self, metrics: Mapping[str, float]) -> bool:
        return self.goal is not None and self.goal.reached(metrics)

    def _goal(self, model: nn.Module) -> TdecThresholds:
        """As measured on unseen sequences where there are some, else as given, in a preset for example."""
        unseen, given = self.options.unseen, (self.options.el_threshold, self.options.ma_threshold)
        if unseen is not None:
            return tdec_thresholds(model, sequences_of(self.sources.examples(unseen), unseen))
        if None in given:
            raise CommandError("--benchmark tdec needs --unseen, or both of --el_threshold and --ma_threshold")
        return TdecThresholds(*given)

    def _tdec(self, model: nn.Module) -> dict[str, float]:
        """EL_10 takes far longer than MA, and both must come down: so but for the first time it waits for MA."""
        metrics = evaluate_tdec(model, self.sequences, extraction=False)
        if self.first or metrics["ma"] <= self.goal.memorization_accuracy:
            metrics["el_10"] = extraction_likelihood(model, self.sequences).mean().item()
        self.first = False
        return metrics

    def _tofu(self, model: nn.Module) -> dict[str, float]:
        log = measure_tofu(model, self.sources, self.splits, self.options.limit)
        with blaming("tofu" if self.retain_log is None else f"--retain_log {self.options.retain_log}"):
            measures = aggregate_tofu(log, self.retain_log)
        return {name: value for name, value in measures.items() if value is not None}


def tofu_sources(forget: str | None, sources: Tokenised) -> dict[str, str]:
    """The splits that TOFU's evaluation of a forget split needs. Raises CommandError if one cannot be had."""
    if forget not in TOFU_FORGET_SPLITS:
        raise CommandError(f"--forget must be one of {', '.join(TOFU_FORGET_SPLITS)} for TOFU, but is {forget}")
    splits = {**SOURCES, "forget": f"{forget}_perturbed"}
    for split in splits.values():
        sources.records(split)  # before hours are spent on the others
    return splits


def measure_tofu(
    model: nn.Module,
    sources: Tokenised,
    splits: Mapping[str, str],
    limit: int | None,
    output: Path | None = None,
    show_progress_bar: bool = False,
) -> TofuLog:
    """TOFU's log of `tofu_sources`, to ``output``, whose parts are not measured again."""
    with blaming("tofu"):
        return evaluate_tofu(
            model,
            sources.tokenizer,
            sources.prompt,
            sources=splits,
            data_dir=sources.data_dir,
            limit=limit,
            max_length=min(TOFU_LENGTH, sources.max_length),
            output=output,
            resume=True,
            show_progress_bar=show_progress_bar,
        )


def tofu_log(path: str) -> TofuLog:
    with blaming(f"--retain_log {path}"):
        return read_log(path)


def sequences_of(examples: Sequence[Example], source: str) -> Tensor:
    """(N, T), of examples that all have one length."""
    lengths = {len(example["input_ids"]) for example in examples}
    if len(lengths) > 1 or min(lengths) <= 10:
        raise CommandError(f"{source}: tdec needs sequences of one length above 10, but these have {sorted(lengths)}")
    return torch.tensor([example["input_ids"] for example in examples])
