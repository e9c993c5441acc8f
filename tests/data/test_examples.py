from __future__ import annotations

import pytest
from data_helpers import WORDS, shared_data, word_tokenizer
from transformers import GPT2Tokenizer, GPTNeoConfig, LlamaConfig, Phi3Config, PhiConfig

from loku.data import IGNORE_INDEX, PROMPTS, answer_example, load_records, prompt_for, tokenise

X = IGNORE_INDEX
RECORD = {"question": "who are you", "answer": "Ada"}


def words(ids: list[int]) -> list[str]:
    return ["-" if i == X else WORDS[i] for i in ids]


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("closes", [False, True])
@pytest.mark.parametrize(
    ("prompt", "before", "after"),
    [
        ("llama2", ["[INST]", "who", "are", "you", "[/INST]"], ["Ada", "</s>"]),
        ("phi", ["Question:", "who", "are", "you", "\n"], ["Answer:", "Ada", "</s>"]),  # its answer tag is scored
        ("plain", ["who", "are", "you", "\n"], ["Ada", "</s>"]),
    ],
)
def test_only_the_answer_and_one_end_are_labelled(bos, closes, prompt, before, after):
    tokenizer = word_tokenizer(bos, closes=closes)
    record = RECORD if prompt != "llama2" else {**RECORD, "answer": " Ada"}  # words are parted by blanks here
    (example,) = tokenise([record], tokenizer, prompt)
    before = ["<s>", *before] if bos else before
    assert words(example["input_ids"]) == before + after
    assert words(example["labels"]) == ["-"] * len(before) + after


def test_templates_are_those_published():
    assert PROMPTS["llama2"].question("Q?") + PROMPTS["llama2"].answer("A.") == "[INST] Q? [/INST]A."
    assert PROMPTS["phi"].question("Q?") + PROMPTS["phi"].answer("A.") == "Question: Q?\nAnswer: A."


def test_prompt_tokens_are_counted_alone():
    """As published, even where a token reaches from the prompt into the answer: GPT-2 has one for two line breaks."""
    tokenizer = GPT2Tokenizer.from_pretrained(shared_data() / "gpt2_tokenizer")
    example = answer_example("Who?", "\nAda", tokenizer, "plain")
    assert example["input_ids"] == [*tokenizer("Who?\n\nAda").input_ids, tokenizer.eos_token_id]
    alone = len(tokenizer("Who?\n").input_ids)
    assert example["labels"] == [X] * alone + example["input_ids"][alone:]


def test_tofu_with_the_gpt2_tokenizer():
    folder = shared_data()
    tokenizer = GPT2Tokenizer.from_pretrained(folder / "gpt2_tokenizer")
    records = load_records("forget01", folder)
    for record, example in zip(records, tokenise(records, tokenizer, "phi", 512), strict=True):
        assert tokenizer.decode(example["input_ids"]) == (
            f"Question: {record['question']}\nAnswer: {record['answer']}<|endoftext|>"
        )
        labelled = [label for label in example["labels"] if label != X]
        assert tokenizer.decode(labelled) == f"Answer: {record['answer']}<|endoftext|>"
        assert example["labels"][-len(labelled) :] == labelled == example["input_ids"][-len(labelled) :]


def test_texts_are_cut_into_blocks_that_stay_in_their_record():
    records = [{"text": "a b c a b c a"}, {"text": "c c"}]
    examples = tokenise(records, word_tokenizer(), max_length=3)
    assert [words(e["input_ids"]) for e in examples] == [["a", "b", "c"], ["a", "b", "c"], ["c", "c"]]
    assert all(e["labels"] == e["input_ids"] for e in examples)
    (whole,) = tokenise(records[:1], word_tokenizer(bos=True))
    assert words(whole["input_ids"]) == ["<s>", *"abcabca"]


def test_token_ids_are_taken_as_they_are():
    whole, last = {"input_ids": [5, 6, 7], "labels": [5, 6, 7]}, {"input_ids": [5, 6, 7], "labels": [X, X, 7]}
    assert tokenise([{"input_ids": [5, 6, 7]}, {"input_ids": [5, 6, 7], "labels": None}]) == [whole, whole]
    assert tokenise([last]) == [last]


def test_too_long():
    tokenizer = word_tokenizer()
    with pytest.raises(ValueError, match=r"record 1: 6 tokens, but max_length = 5"):
        tokenise([{"text": "a b"}, RECORD], tokenizer, "plain", 5)
    with pytest.raises(ValueError, match=r"record 0: 3 tokens, but max_length = 2"):
        tokenise([{"input_ids": [1, 2, 3]}], max_length=2)
    assert len(tokenise([RECORD], tokenizer, "plain", 6)) == 1
    (cut,) = tokenise([RECORD], tokenizer, "plain", 5, truncation=True)
    assert words(cut["input_ids"]) == ["who", "are", "you", "\n", "Ada"]
    assert words(cut["labels"]) == ["-", "-", "-", "-", "Ada"]  # and no end: the answer goes on
    with pytest.raises(ValueError, match="record 0: nothing to score in its 3 tokens"):
        tokenise([RECORD], tokenizer, "plain", 3, truncation=True)


def test_padding_of_records_is_left_out():
    record = {"input_ids": [0, 0, 3, 4], "attention_mask": [0, 0, 1, 1]}
    assert tokenise([record], max_length=2) == [{"input_ids": [3, 4], "labels": [3, 4]}]
    labelled = {**record, "labels": [X, X, X, 4]}
    assert tokenise([labelled]) == [{"input_ids": [3, 4], "labels": [X, 4]}]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"question": "a"}, r"record 0: expected question and answer, text, or input_ids, got the keys \['question'\]"),
        ({"text": ""}, "record 0: nothing to score in a text of 0 tokens"),
        ({"text": "a"}, "record 0: nothing to score in a text of 1 tokens"),
        ({"input_ids": [3]}, "record 0: nothing to score in its 1 tokens"),
        ({"input_ids": [3, 4], "labels": [3, X]}, "record 0: nothing to score in its 2 tokens"),
        ({"input_ids": [3, 4], "labels": [3]}, "record 0: 1 labels for 2 input_ids"),
    ],
)
def test_refused_records(record, message):
    with pytest.raises(ValueError, match=message):
        tokenise([record], word_tokenizer())


def test_refused_tokenizers_and_settings():
    with pytest.raises(ValueError, match="record 0: a question needs a tokenizer"):
        tokenise([RECORD])
    with pytest.raises(ValueError, match="record 0: text needs a tokenizer"):
        tokenise([{"text": "a b"}])
    with pytest.raises(ValueError, match=r"has no end-of-sequence token"):
        tokenise([RECORD], word_tokenizer(eos=False))
    assert len(tokenise([{"text": "a b"}], word_tokenizer(eos=False))) == 1  # texts do not end
    with pytest.raises(ValueError, match="prompt must be one of llama2, phi, plain, or a PromptTemplate, got 'alpaca'"):
        tokenise([RECORD], word_tokenizer(), "alpaca")
    with pytest.raises(ValueError, match="max_length must be at least 2 tokens, got 1"):
        tokenise([RECORD], word_tokenizer(), max_length=1)


@pytest.mark.parametrize(
    ("model", "name"),
    [
        (LlamaConfig(), "llama2"),
        (PhiConfig(), "phi"),
        (Phi3Config(), "phi"),
        (GPTNeoConfig(), "plain"),
        ("meta-llama/Llama-2-7b-chat-hf", "llama2"),
        ("runs/phi/llama2-7b/", "llama2"),
        ("microsoft/phi-1_5", "phi"),
        ("locuslab/tofu_ft_phi-1.5", "phi"),
        ("someone/dolphin", "plain"),
        ("EleutherAI/gpt-neo-125m", "plain"),
        *((name, name) for name in PROMPTS),
    ],
)
def test_prompt_for(model, name):
    assert prompt_for(model).name == name


def test_prompt_for_something_else():
    with pytest.raises(TypeError, match="a config of transformers or a name, got int"):
        prompt_for(3)
