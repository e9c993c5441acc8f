"""A tokenizer of whole words, and sequences at random, for tests of the data package."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Sequence, Split
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from loku.data import IGNORE_INDEX, Example

WORDS = [
    "<s>",
    "</s>",
    "?",
    "[INST]",
    "[/INST]",
    "Question:",
    "Answer:",
    "\n",
    "who",
    "are",
    "you",
    "Ada",
    "a",
    "b",
    "c",
]


def word_tokenizer(bos: bool = False, eos: bool = True, closes: bool = False) -> PreTrainedTokenizerFast:
    """Token id = place in `WORDS`. ``bos``: begins texts with <s>; ``closes``: ends them with </s>."""
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="?"))
    # A line break is a token, other blanks only part words.
    tokenizer.pre_tokenizer = Sequence([Split("\n", "isolated"), Split(" ", "removed")])
    if bos or closes:
        single = " ".join(["<s>"] * bos + ["$A"] + ["</s>"] * closes)
        tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=[("<s>", 0), ("</s>", 1)])
    special = {"unk_token": "?", "bos_token": "<s>"} | ({"eos_token": "</s>"} if eos else {})
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def shared_data() -> Path:
    """Folder of the real data sets; skips the test where there is none."""
    beside = Path(__file__).parents[3] / "shared" / "data"
    folder = Path(os.environ.get("LOKU_DATA", beside))
    if not (folder / "tofu").is_dir():
        pytest.skip("no data sets: neither LOKU_DATA nor ../shared/data has them")
    return folder


@st.composite
def examples(draw: st.DrawFn) -> Example:
    """2 to 9 tokens, of which some, but at least one that is not the first, carry another number as label."""
    length = draw(st.integers(2, 9))
    input_ids = draw(st.lists(st.integers(0, 50), min_size=length, max_size=length))
    labelled = draw(st.lists(st.booleans(), min_size=length, max_size=length))
    labelled[draw(st.integers(1, length - 1))] = True
    labels = [100 + i if is_labelled else IGNORE_INDEX for i, is_labelled in enumerate(labelled)]
    return {"input_ids": input_ids, "labels": labels}
