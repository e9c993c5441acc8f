"""From raw records to token ids and labels."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NotRequired, TypedDict

import torch
from transformers import PreTrainedTokenizerBase

from loku.data.json_lines import place_of
from loku.data.prompts import PROMPTS, PromptTemplate
from loku_kernels.sequences import IGNORE_INDEX


class Example(TypedDict):
    """One sequence. ``labels`` stand at their own token, not shifted; `IGNORE_INDEX` where it is not scored.

    Tokens at which an ``attention_mask`` is 0 are padding, and are left out.
    """

    input_ids: list[int]
    labels: list[int]
    attention_mask: NotRequired[list[int]]


def is_question(record: Mapping[str, Any]) -> bool:
    """Whether `tokenise` takes the record for a question with its answer, whatever other keys it has."""
    return "input_ids" not in record and "question" in record and "answer" in record


def tokenise(
    records: Iterable[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase | None = None,
    prompt: PromptTemplate | str = "plain",
    max_length: int | None = None,
    *,
    truncation: bool = False,
) -> list[Example]:
    """Examples of the records that `load_records` gives, in their order.

    - ``question`` and ``answer``: see `answer_example`.
    - ``text``: its tokens, with those that the tokenizer adds, in blocks of ``max_length``, all labelled. A record is
      a document: no block reaches into the next record, and a last block of one token, which would score nothing, is
      left out.
    - ``input_ids``: as they are, all labelled; ``labels`` as given, where they are, and are not None; without what an
      ``attention_mask`` calls padding.

    Args:
        tokenizer: not needed where all records have input_ids.
        prompt: template, or its name in `PROMPTS`.
        max_length: most tokens an example may have: no more than the model's context. None: no limit.
        truncation: cut questions with answers, and input_ids, that are longer, instead of refusing them. A cut answer
            has no end-of-sequence label, as published with TOFU.

    Raises:
        ValueError: a record has none of these keys, is longer than max_length, or has nothing to score (its line is
            named where it is from a file, else its number, from 0); the tokenizer is missing or has no end-of-sequence
            token.
    """
    if max_length is not None and max_length < 2:
        raise ValueError(f"max_length must be at least 2 tokens, got {max_length}")
    template = _template(prompt)
    examples = []
    for number, record in enumerate(records):
        try:
            found = _examples(record, tokenizer, template, max_length, truncation)
        except ValueError as error:
            raise ValueError(f"{place_of(record, number)}: {error}") from error
        examples.extend(found)
    return examples


def without_padding(example: Mapping[str, Any]) -> Mapping[str, Any]:
    """The example without the tokens at which its ``attention_mask`` is 0, where it has one.

    Raises:
        ValueError: the mask has not as many entries as there are tokens and labels.
    """
    mask = example.get("attention_mask")
    if mask is None:
        return example
    for name in ("input_ids", "labels"):
        if len(example[name]) != len(mask):
            raise ValueError(f"attention_mask has {len(mask)} entries for {len(example[name])} {name}")
    kept = torch.as_tensor(mask).bool()
    if kept.all():
        return example
    return {name: torch.as_tensor(example[name])[kept].tolist() for name in ("input_ids", "labels")}


def scored_length(example: Mapping[str, Any]) -> int:
    """The example's tokens, without padding.

    Raises:
        ValueError: it has no input_ids or labels, not as many of these as of those, or no label that can be scored.
    """
    for name in ("input_ids", "labels"):
        if name not in example:
            raise ValueError(f"an example has input_ids and labels, but this has {sorted(example)}")
    example = without_padding(example)
    _check_counts(example)
    return len(_scored(example)["input_ids"])


def answer_example(
    question: str,
    answer: str,
    tokenizer: PreTrainedTokenizerBase,
    prompt: PromptTemplate | str,
    max_length: int | None = None,
    *,
    truncation: bool = False,
) -> Example:
    """A question with its answer, of which the answer and one end-of-sequence token are labelled.

    As published with TOFU (arXiv 2401.06121): prompt and answer are tokenised as one text, the end-of-sequence token
    follows, and the prompt's tokens, counted by tokenising the prompt alone, carry no label. Special tokens that the
    tokenizer begins with count for the prompt; an end-of-sequence token that it adds itself is not added twice.

    Raises:
        ValueError: as `tokenise` does.
    """
    template = _template(prompt)
    if tokenizer is None:
        raise ValueError("a question needs a tokenizer, got None")
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"tokenizer ({type(tokenizer).__name__}) has no end-of-sequence token, which every answer ends with; "
            "set tokenizer.eos_token"
        )
    prompt_length = len(_open_ended(template.question(question), tokenizer))
    tokens = _open_ended(template.question(question) + template.answer(answer), tokenizer)
    input_ids = _fitted([*tokens, tokenizer.eos_token_id], max_length, truncation)
    labels = [IGNORE_INDEX] * min(prompt_length, len(input_ids)) + input_ids[prompt_length:]
    return _scored({"input_ids": input_ids, "labels": labels})


def _examples(
    record: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase | None,
    template: PromptTemplate,
    max_length: int | None,
    truncation: bool,
) -> list[Example]:
    if "input_ids" in record:
        labels = record["input_ids"] if record.get("labels") is None else record["labels"]
        example = without_padding({**record, "labels": labels})
        _check_counts(example)
        fitted = {name: _fitted(list(example[name]), max_length, truncation) for name in ("input_ids", "labels")}
        return [_scored(fitted)]
    if is_question(record):
        question, answer = record["question"], record["answer"]
        return [answer_example(question, answer, tokenizer, template, max_length, truncation=truncation)]
    if "text" in record:
        return _blocks(record["text"], tokenizer, max_length)
    raise ValueError(f"expected question and answer, text, or input_ids, got the keys {sorted(record)}")


def _blocks(text: str, tokenizer: PreTrainedTokenizerBase | None, max_length: int | None) -> list[Example]:
    if tokenizer is None:
        raise ValueError("text needs a tokenizer, got None")
    tokens = tokenizer(text, verbose=False).input_ids  # verbose: it would warn of texts longer than a context
    size = max_length or max(len(tokens), 1)
    blocks = [tokens[start : start + size] for start in range(0, len(tokens), size)]
    if not blocks or len(blocks[0]) < 2:
        raise ValueError(f"nothing to score in a text of {len(tokens)} tokens")
    return [{"input_ids": block, "labels": list(block)} for block in blocks if len(block) > 1]


def _open_ended(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    tokens = tokenizer(text, verbose=False).input_ids
    return tokens[:-1] if len(tokens) > 1 and tokens[-1] == tokenizer.eos_token_id else tokens


def _fitted(input_ids: list[int], max_length: int | None, truncation: bool) -> list[int]:
    if max_length is None or len(input_ids) <= max_length:
        return input_ids
    if not truncation:
        raise ValueError(
            f"{len(input_ids)} tokens, but max_length = {max_length}: shorten the record, or raise max_length, to the "
            "model's context at most"
        )
    return input_ids[:max_length]


def _check_counts(example: Mapping[str, Any]) -> None:
    if len(example["labels"]) != len(example["input_ids"]):
        raise ValueError(f"{len(example['labels'])} labels for {len(example['input_ids'])} input_ids")


def _scored(example: Example) -> Example:
    if bool((torch.as_tensor(example["labels"][1:]) == IGNORE_INDEX).all()):
        raise ValueError(f"nothing to score in its {len(example['input_ids'])} tokens (the first is never scored)")
    return example


def _template(prompt: PromptTemplate | str) -> PromptTemplate:
    if isinstance(prompt, PromptTemplate):
        return prompt
    if prompt not in PROMPTS:
        raise ValueError(f"prompt must be one of {', '.join(PROMPTS)}, or a PromptTemplate, got {prompt!r}")
    return PROMPTS[prompt]
