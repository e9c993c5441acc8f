"""Data as the commands take them: sources by name, to tokenised examples."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from loku.cli.errors import CommandError, blaming
from loku.cli.options import DataOptions
from loku.data import (
    DEFAULT_REFUSALS,
    Example,
    LanguageModelCollator,
    PromptTemplate,
    load_records,
    load_refusals,
    prompt_for,
    token_budget_batches,
    tokenise,
    with_refusals,
)
from loku.inference import context_length

_LONGEST = 512  # where neither the user nor the model says less


@dataclass(frozen=True)
class Tokenised:
    """Loads sources as examples of one tokenizer, template and length."""

    tokenizer: PreTrainedTokenizerBase
    prompt: PromptTemplate
    max_length: int
    vocabulary: int
    data_dir: str | None

    @classmethod
    def of(cls, options: DataOptions, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> Tokenised:
        """Raises CommandError if max_length exceeds the model's context."""
        context = context_length(model) or options.max_length or _LONGEST
        max_length = options.max_length or min(_LONGEST, context)
        if max_length > context:
            raise CommandError(f"--max_length {max_length} exceeds the model's context of {context} tokens")
        prompt = prompt_for(model.config if options.prompt == "auto" else options.prompt)
        vocabulary = model.get_input_embeddings().weight.shape[0]
        return cls(tokenizer, prompt, max_length, vocabulary, options.data_dir)

    def records(self, source: str) -> list[dict]:
        """Raises CommandError where there is no such source, or its file is at fault."""
        with blaming():
            return load_records(source, self.data_dir)

    def examples(self, source: str) -> list[Example]:
        """Raises CommandError where a source's record is at fault, with its name."""
        return self.tokenise(self.records(source), source)

    def refusals(self, source: str, refusals: str | None, seed: int) -> list[Example]:
        """The questions of a source, each with an answer that declines."""
        with blaming(f"--refusals {refusals}"):
            lines = DEFAULT_REFUSALS if refusals is None else load_refusals(refusals)
        records = self.records(source)
        with blaming(source):
            records = with_refusals(records, lines, seed=seed)
        return self.tokenise(records, source)

    def tokenise(self, records: Sequence[dict], source: str) -> list[Example]:
        """Raises CommandError where a record is at fault, or has tokens that the model does not know."""
        with blaming(source):
            examples = tokenise(records, self.tokenizer, self.prompt, self.max_length)
        for key, what in (("input_ids", "token id"), ("labels", "label")):
            highest = max((max(example[key]) for example in examples), default=0)
            if highest >= self.vocabulary:
                raise CommandError(f"{source} has the {what} {highest}, but the model knows {self.vocabulary} tokens")
        return examples


def count_shared(forget: Sequence[Example], retain: Sequence[Example]) -> int:
    """How many of the sequences to forget are also among those to keep."""
    sequences = [tuple(example["input_ids"]) for example in forget]
    shared = set(sequences).intersection(tuple(example["input_ids"]) for example in retain)
    return sum(sequence in shared for sequence in sequences)


def importance_batches(
    forget: Sequence[Example], retain: Sequence[Example], retain_size: int | None, tokens: int, seed: int
) -> tuple[list[dict[str, Tensor]], list[dict[str, Tensor]]]:
    """Batches for the Fisher information of both sets: all of ``forget``, and as many of ``retain``, drawn by ``seed``,
    unless told how many. The authors' program, too, sees one retain example for each forget example."""
    size = min(len(retain), len(forget) if retain_size is None else retain_size)
    drawn = random.Random(seed).sample(list(retain), size)
    return tuple(_batches(examples, tokens) for examples in (forget, drawn))


def digest(data: Iterable[Sequence[Mapping[str, Tensor | list[int]]]]) -> str:
    """16 hexadecimal digits of everything in the batches, or examples, of some data sets."""
    found = hashlib.sha256()
    for batches in data:
        for batch in batches:
            for key, value in batch.items():
                value = torch.as_tensor(value)
                found.update(f"{key} {tuple(value.shape)} {value.flatten().tolist()}\n".encode())
        found.update(b"end of a set\n")
    return found.hexdigest()[:16]


def _batches(examples: Sequence[Example], tokens: int) -> list[dict[str, Tensor]]:
    collate = LanguageModelCollator()
    return [collate([examples[i] for i in batch]) for batch in token_budget_batches(examples, tokens)]
