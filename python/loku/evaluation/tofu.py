"""TOFU: what a model says and how likely it finds true and false answers, as a log in the published format."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from loku.data.examples import answer_example
from loku.data.json_lines import place_of
from loku.data.prompts import PROMPTS, PromptTemplate, prompt_for
from loku.data.records import load_records
from loku.evaluation.generation import generate_greedily, rouge_recall
from loku.evaluation.losses import sequence_losses
from loku.evaluation.tofu_log import TASKS, TofuLog, read_log, write_log
from loku.inference import context_length

SOURCES = {
    "retain": "retain_perturbed",
    "real_authors": "real_authors_perturbed",
    "world_facts": "world_facts_perturbed",
    "forget": "forget10_perturbed",
}
"""The published splits of each part; of the forget set there are forget01, forget05 and forget10."""


def evaluate_tofu(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompt: PromptTemplate | str | None = None,
    *,
    sources: Mapping[str, str] = SOURCES,
    data_dir: str | os.PathLike | None = None,
    limit: int | None = 300,
    max_length: int = 200,
    batch_size: int = 32,
    output: str | os.PathLike | None = None,
    resume: bool = False,
    show_progress_bar: bool = False,
) -> TofuLog:
    """The evaluation of TOFU (arXiv 2401.06121, section 2.2), for `aggregate_tofu`.

    Of each sample: the answer that the model generates greedily and its ROUGE recall of the true one, and -log p of the
    answer, of its paraphrase and of each false answer, in nats, of the whole answer and a token, with the
    end-of-sequence token.

    Args:
        prompt: template or its name; by default the one that `prompt_for` picks for the model's config.
        sources: part -> what `loku.data.load_records` takes, with records of question, answer, perturbed_answer (a
            list, of the same length in a source) and, for retain and forget, paraphrased_answer. Parts may be left
            out: then `aggregate_tofu` leaves out what needs them.
        data_dir: folder of the data, else LOKU_DATA, else the hub.
        limit: the first so many samples of each part, 300 as published; None for all.
        max_length: most tokens of a question with its generated answer, 200 as published.
        batch_size: questions answered at once.
        output: file that the log is written to, after every part.
        resume: keep the parts that ``output`` holds already.

    Returns:
        Task -> metric -> sample's index as a string -> value, with the tasks' and metrics' published names.

    Raises:
        ValueError: a part is unknown or there are none, a record lacks a field, an answer is longer than the model's
            context, the tokenizer has no end-of-sequence token.
    """
    if not sources or not set(sources) <= set(TASKS):
        raise ValueError(f"sources must have some of the parts {', '.join(TASKS)}, got {', '.join(sources) or 'none'}")
    template = _template(prompt, model)
    log = read_log(output) if resume and output is not None and os.path.exists(output) else {}
    for part in (part for part in TASKS if part in sources and TASKS[part] not in log):
        records = [_checked(record, part, i) for i, record in enumerate(load_records(sources[part], data_dir)[:limit])]
        metrics = {
            **_answers(model, tokenizer, template, records, part, max_length, batch_size, show_progress_bar),
            **_likelihoods(model, tokenizer, template, records, part, show_progress_bar),
        }
        log[TASKS[part]] = {name: {str(i): value for i, value in enumerate(metrics[name])} for name in metrics}
        if output is not None:
            write_log(log, output)
    return log


def _answers(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    template: PromptTemplate,
    records: list[Mapping[str, Any]],
    part: str,
    max_length: int,
    batch_size: int,
    show: bool,
) -> dict[str, list]:
    prompts, truths = [template.question(record["question"]) for record in records], [x["answer"] for x in records]
    generated = generate_greedily(
        model, tokenizer, prompts, max_length=max_length, batch_size=batch_size, what=f"{part} answers",
        show_progress_bar=show,
    )  # fmt: skip
    texts = [list(text) for text in zip(prompts, generated, truths, strict=True)]
    return {"generated_text": texts, **rouge_recall(generated, truths)}


def _likelihoods(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    template: PromptTemplate,
    records: list[Mapping[str, Any]],
    part: str,
    show: bool,
) -> dict[str, list]:
    answers = [[r["answer"], r.get("paraphrased_answer", r["answer"]), *r["perturbed_answer"]] for r in records]
    examples = [
        answer_example(record["question"], answer, tokenizer, template, context_length(model))
        for record, texts in zip(records, answers, strict=True)
        for answer in texts
    ]
    losses = sequence_losses(model, examples, what=f"{part} losses", show_progress_bar=show)
    total, tokens, mean = (x.view(len(records), -1) for x in (losses.total, losses.tokens, losses.mean))
    metrics = {
        "avg_gt_loss": mean[:, 0],
        "gt_loss": total[:, 0],
        "num_token_gt": tokens[:, 0],
        "avg_paraphrased_loss": mean[:, 1],
        "paraphrased_loss": total[:, 1],
        "num_token_paraphrased": tokens[:, 1],
        "average_perturb_loss": mean[:, 2:],
        "perturb_loss": total[:, 2:],
        "num_token_perturb": tokens[:, 2:],
        "truth_ratio": (mean[:, 1] - mean[:, 2:].mean(1)).exp(),
    }
    if part in ("real_authors", "world_facts"):
        options = torch.cat([mean[:, :1], mean[:, 2:]], dim=1)
        metrics["normalized_gt_loss"] = mean[:, 0] + (-options).logsumexp(1)
    return {name: values.tolist() for name, values in metrics.items()}


def _template(prompt: PromptTemplate | str | None, model: nn.Module) -> PromptTemplate:
    if prompt is None:
        return prompt_for(model.config)
    if isinstance(prompt, str):
        if prompt not in PROMPTS:
            raise ValueError(f"prompt must be one of {', '.join(PROMPTS)}, or a PromptTemplate, got {prompt!r}")
        return PROMPTS[prompt]
    return prompt


def _checked(record: Mapping[str, Any], part: str, index: int) -> Mapping[str, Any]:
    paraphrase = () if part in ("real_authors", "world_facts") else ("paraphrased_answer",)
    for field in ("question", "answer", *paraphrase, "perturbed_answer"):
        if not record.get(field):
            place = place_of(record, index)
            raise ValueError(f"{place} of the {part} source has no {field}; its perturbed split is expected")
    return record
