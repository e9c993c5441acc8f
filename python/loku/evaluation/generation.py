"""Greedy answers to questions, and how much of the true answers they contain."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedTokenizerBase

from loku.fila.progress import progress
from loku.inference import context_length, evaluation_mode

# Thai and Lao, Burmese, Khmer, kana, Chinese characters: no blanks between words; Hangul: particles on the words.
_UNSPACED = re.compile(
    "([\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff\U00020000-\U0003ffff])"
)


def generate_greedily(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    max_length: int = 200,
    batch_size: int = 32,
    what: str = "answers",
    show_progress_bar: bool = False,
) -> list[str]:
    """The likeliest continuation of each prompt, token by token, until the end-of-sequence token or ``max_length``.

    Args:
        max_length: most tokens of a prompt and its continuation, without padding; 200, as published with TOFU, which
            however counts the padding of a batch, so that there the length depends on the batch.
        batch_size: prompts at once, padded on the left to the longest; they are batched by length.

    Raises:
        ValueError: the tokenizer has no end-of-sequence token; max_length exceeds the model's context or leaves no
            room after a prompt.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError("tokenizer has no end-of-sequence token, which ends an answer; set tokenizer.eos_token")
    context = context_length(model)
    if context is not None and max_length > context:
        raise ValueError(f"max_length must be at most the model's context of {context}, got {max_length}")
    tokens = [_open_ended(tokenizer(prompt, verbose=False).input_ids, tokenizer.eos_token_id) for prompt in prompts]
    for prompt, ids in zip(prompts, tokens, strict=True):
        if not 0 < len(ids) < max_length:
            raise ValueError(f"max_length = {max_length} leaves no answer to a prompt of {len(ids)} tokens: {prompt!r}")
    # The longest prompt of a batch is continued until the shortest is done, which must not lead beyond the context.
    spread = math.inf if context is None else context - max_length
    batches = _batches([len(ids) for ids in tokens], batch_size, spread)
    answers = [""] * len(prompts)
    with evaluation_mode(model) as device, _without_defaults(model):
        for indices in progress(batches, what, "batch", show_progress_bar):
            found = _continuations(model, [tokens[i] for i in indices], tokenizer.eos_token_id, max_length, device)
            for i, text in zip(indices, tokenizer.batch_decode(found, skip_special_tokens=True), strict=True):
                answers[i] = text
    return answers


def rouge_recall(generated: Sequence[str], truths: Sequence[str]) -> dict[str, list[float]]:
    """Recall of ROUGE-1 and ROUGE-L of each text: "rouge1_recall", "rougeL_recall".

    As published, rouge-score's words of a-z and 0-9 with its stemmer; but where fewer than half of a truth's letters
    and digits are ASCII, lower-cased words of any script, of Chinese, Japanese, Korean, Thai and the like characters.
    """
    published = RougeScorer(["rouge1", "rougeL"], use_stemmer=True)
    any_script = RougeScorer(["rouge1", "rougeL"], tokenizer=_AnyScript())
    scores = [
        (published if _is_mostly_ascii(truth) else any_script).score(truth, text)
        for truth, text in zip(truths, generated, strict=True)
    ]
    return {f"{kind}_recall": [score[kind].recall for score in scores] for kind in ("rouge1", "rougeL")}


class _AnyScript(Tokenizer):
    """Words are letters, digits and the marks on them, which Python's ``\\w`` lacks; Hindi's vowels are such marks."""

    def tokenize(self, text: str) -> list[str]:
        text = unicodedata.normalize("NFKC", text).lower()
        words = "".join(character if unicodedata.category(character)[0] in "LMN" else " " for character in text)
        return _UNSPACED.sub(r" \1 ", words).split()


def _is_mostly_ascii(text: str) -> bool:
    characters = [character.isascii() for character in text if character.isalnum()]
    return 2 * sum(characters) >= len(characters)


def _batches(lengths: Sequence[int], batch_size: int, spread: float) -> list[list[int]]:
    """Indices by length, the longest first; in a batch lengths differ by ``spread`` at most."""
    batches: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if not batches or len(batches[-1]) == batch_size or lengths[batches[-1][0]] - lengths[i] > spread:
            batches.append([])
        batches[-1].append(i)
    return batches


def _continuations(
    model: nn.Module, prompts: list[list[int]], eos: int, max_length: int, device: torch.device
) -> list[Tensor]:
    longest, shortest = (f(map(len, prompts)) for f in (max, min))
    input_ids = torch.tensor([[eos] * (longest - len(ids)) + ids for ids in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts], device=device)
    settings = GenerationConfig(
        do_sample=False, max_new_tokens=max_length - shortest, eos_token_id=eos, pad_token_id=eos, use_cache=True
    )
    out = model.generate(input_ids=input_ids, attention_mask=mask, generation_config=settings)[:, longest:]
    return [row[: max_length - len(ids)] for row, ids in zip(out, prompts, strict=True)]


@contextmanager
def _without_defaults(model: nn.Module) -> Iterator[None]:
    """What is published with a model may penalise repetition, say, where nothing else is asked for."""
    # The modules' own: wrappers show the defaults of what they wrap.
    published = {m: m.generation_config for m in model.modules() if "generation_config" in vars(m)}
    try:
        for module in published:
            module.generation_config = GenerationConfig()
        yield
    finally:
        for module, defaults in published.items():
            module.generation_config = defaults


def _open_ended(input_ids: list[int], eos: int) -> list[int]:
    """Without an end-of-sequence token that the tokenizer adds."""
    return input_ids[:-1] if len(input_ids) > 1 and input_ids[-1] == eos else input_ids
