"""From a model and records to a log: generation, ROUGE and losses, against one sample at a time."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from rouge_score.rouge_scorer import RougeScorer
from small_models import FAMILIES, VOCABULARY, build, token_ids
from torch.nn.functional import cross_entropy
from transformers import GenerationConfig, GPT2Tokenizer, GPTNeoConfig, GPTNeoForCausalLM

from loku.data import PROMPTS, load_records
from loku.evaluation import aggregate_tofu, evaluate_tofu, read_log
from loku.evaluation.generation import generate_greedily, rouge_recall
from loku.evaluation.tofu import SOURCES
from loku.evaluation.tofu_log import TASKS

LIMIT = 5


class Numbers:
    """A tokenizer whose texts are token ids, apart by blanks; it ends texts with the end-of-sequence token."""

    def __init__(self, eos_token_id: int | None) -> None:
        self.eos_token_id = eos_token_id

    def __call__(self, text: str, **_) -> SimpleNamespace:
        return SimpleNamespace(input_ids=[*map(int, text.split()), self.eos_token_id])

    def batch_decode(self, rows, skip_special_tokens: bool) -> list[str]:
        return [" ".join(str(t) for t in row.tolist() if t != self.eos_token_id) for row in rows]


def prompts() -> list[str]:
    return [" ".join(map(str, row[:k])) for row, k in zip(token_ids(5, 12).tolist(), (3, 12, 5, 5, 8), strict=True)]


def one_at_a_time(model, prompt: str, eos: int, max_length: int) -> str:
    tokens = [int(token) for token in prompt.split()]
    answer = []
    while len(tokens) + len(answer) < max_length:
        with torch.no_grad():
            token = model(torch.tensor([tokens + answer])).logits[0, -1].argmax().item()
        if token == eos:
            break
        answer.append(token)
    return " ".join(map(str, answer))


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_do_not_depend_on_the_batch(family):
    model, max_length = build(family), 30
    never = [one_at_a_time(model, prompt, -1, max_length) for prompt in prompts()]
    eos = int(never[2].split()[4])  # a token that an answer meets on its way
    expected = [one_at_a_time(model, prompt, eos, max_length) for prompt in prompts()]
    assert expected != never and any(len(text.split()) > 10 for text in expected)
    for batch_size in (1, 2, 32):
        found = generate_greedily(model, Numbers(eos), prompts(), max_length=max_length, batch_size=batch_size)
        assert found == expected


@pytest.mark.parametrize("wrapped", [False, True])
def test_answers_are_greedy_whatever_is_published_with_the_model(wrapped):
    model = build("llama")
    expected = [one_at_a_time(model, prompt, 0, 30) for prompt in prompts()]
    published = {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "num_beams": 2, "return_dict_in_generate": True}
    model.generation_config = GenerationConfig(**published, stop_strings=["a"])
    before = model.generation_config
    if wrapped:
        model = get_peft_model(model, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
        model.generation_config = before  # its own, which it hands on
    assert generate_greedily(model, Numbers(0), prompts(), max_length=30) == expected
    assert model.generation_config is before


def test_generation_refuses():
    model = build("llama")
    with pytest.raises(ValueError, match="no end-of-sequence token"):
        generate_greedily(model, Numbers(None), prompts())
    with pytest.raises(ValueError, match="max_length must be at most the model's context of 64, got 200"):
        generate_greedily(model, Numbers(0), prompts())
    with pytest.raises(ValueError, match="max_length = 12 leaves no answer to a prompt of 12 tokens"):
        generate_greedily(model, Numbers(VOCABULARY - 1), prompts(), max_length=12)


def test_rouge_is_recall_of_stems():
    scores = rouge_recall(["the cats are running home", "no"], ["a cat runs home", "yes"])
    assert scores["rouge1_recall"] == [3 / 4, 0]  # cat, run, home
    assert rouge_recall(["home runs the cat"], ["the cat runs home"])["rougeL_recall"] == [2 / 4]
    assert rouge_recall(["home runs the cat"], ["the cat runs home"])["rouge1_recall"] == [1.0]


@pytest.mark.parametrize(
    ("truth", "part", "rouge1", "rouge_l"),
    [
        ("Её зовут Анна Ёлкина, 1987", "анна ёлкина, её зовут 2001", 4 / 5, 2 / 5),
        ("她住在北京。", "北京!她在", 4 / 5, 2 / 5),
        ("彼はカメラを買う", "カメラ", 3 / 8, 3 / 8),
        ("ผมชื่อแดง", "แดง", 3 / 9, 3 / 9),
        ("वह दिल्ली में रहती है", "वह दिल्ला में", 2 / 5, 2 / 5),  # another vowel is another word
    ],
)
def test_rouge_of_other_scripts(truth, part, rouge1, rouge_l):
    """Without letters of theirs a text that is said word for word would pass for one that was forgotten."""
    scores = rouge_recall([truth, part, "something else"], [truth] * 3)
    assert scores["rouge1_recall"] == pytest.approx([1.0, rouge1, 0.0])
    assert scores["rougeL_recall"] == pytest.approx([1.0, rouge_l, 0.0])


def test_rouge_is_as_published_where_half_is_ascii():
    """TOFU has names with accents, which the published words break at."""
    truths = ["José Núñez was born in Córdoba", "Anna Анна", "Анна Annas", "- !", "Анна"]
    texts = ["jose nunez, who was born", "Anna", "anna", "-", "Anna"]
    scorer = RougeScorer(["rouge1", "rougeL"], use_stemmer=True)
    expected = [scorer.score(truth, text) for truth, text in zip(truths, texts, strict=True)]
    for kind in ("rouge1", "rougeL"):
        assert rouge_recall(texts, truths)[f"{kind}_recall"] == [score[kind].recall for score in expected]
    assert expected[0]["rouge1"].recall == 2 / 8 and expected[2]["rouge1"].recall == 1


@pytest.fixture(scope="module")
def tokenizer(data_dir):
    return GPT2Tokenizer.from_pretrained(data_dir / "gpt2_tokenizer")


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(0)
    config = GPTNeoConfig(
        vocab_size=50257, hidden_size=16, num_layers=2, num_heads=2, attention_types=[[["global", "local"], 1]],
        window_size=16, max_position_embeddings=256, initializer_range=0.3,
    )  # fmt: skip
    return GPTNeoForCausalLM(config).eval()


@pytest.fixture(scope="module")
def log(model, tokenizer, data_dir, tmp_path_factory):
    torch.set_num_threads(1)
    output = tmp_path_factory.mktemp("tofu") / "log.json"
    log = evaluate_tofu(
        model, tokenizer, "phi", data_dir=data_dir, limit=LIMIT, max_length=70, batch_size=3, output=output
    )
    assert read_log(output) == log
    return log


@pytest.fixture(scope="module")
def published(data_dir):
    return read_log(data_dir / "tofu_eval_logs" / "phi_full.json")


def test_the_log_has_the_published_format(log, published):
    assert list(log) == list(published)
    for task, metrics in published.items():
        assert set(log[task]) == set(metrics)
        for name, values in metrics.items():
            assert list(log[task][name]) == [str(i) for i in range(LIMIT)]
            assert type(log[task][name]["0"]) is type(values["0"])


def test_the_log_scores_the_published_tokens(log, published):
    """Phi's tokenizer cuts these texts as GPT-2's does."""
    for task, metrics in published.items():
        for name in ("num_token_gt", "num_token_paraphrased", "num_token_perturb"):
            assert list(log[task][name].values()) == [metrics[name][str(i)] for i in range(LIMIT)]
        for i in range(LIMIT):
            prompt, _, truth = log[task]["generated_text"][str(i)]
            assert [prompt, truth] == metrics["generated_text"][str(i)][::2]


@pytest.mark.parametrize("part", TASKS)
def test_the_losses_are_those_of_each_answer_alone(log, model, tokenizer, data_dir, part):
    task, template = log[TASKS[part]], PROMPTS["phi"]

    def nats(question: str, answer: str) -> float:
        prompt = tokenizer(template.question(question)).input_ids
        tokens = [*tokenizer(template.question(question) + template.answer(answer)).input_ids, tokenizer.eos_token_id]
        with torch.no_grad():
            logits = model(torch.tensor([tokens])).logits[0, :-1].double()
        return cross_entropy(logits[len(prompt) - 1 :], torch.tensor(tokens[len(prompt) :])).item()

    for i, record in enumerate(load_records(SOURCES[part], data_dir)[:2]):
        at = str(i)
        answer = nats(record["question"], record["answer"])
        paraphrase = (
            nats(record["question"], record["paraphrased_answer"]) if "paraphrased_answer" in record else answer
        )
        false = [nats(record["question"], other) for other in record["perturbed_answer"]]
        assert task["avg_gt_loss"][at] == pytest.approx(answer, rel=1e-5)
        assert task["avg_paraphrased_loss"][at] == pytest.approx(paraphrase, rel=1e-5)
        assert task["average_perturb_loss"][at] == pytest.approx(false, rel=1e-5)
        assert task["truth_ratio"][at] == pytest.approx(math.exp(paraphrase - sum(false) / len(false)), rel=1e-4)
        assert task["gt_loss"][at] == pytest.approx(answer * task["num_token_gt"][at], rel=1e-5)
        if part in ("real_authors", "world_facts"):
            share = math.exp(-answer) / sum(math.exp(-x) for x in [answer, *false])
            assert task["normalized_gt_loss"][at] == pytest.approx(-math.log(share), rel=1e-5)


def test_the_log_can_be_aggregated(log):
    result = aggregate_tofu(log, log)
    assert result["forget_quality"] == 1.0
    assert 0 <= result["model_utility"] <= 1


def test_parts_and_records_are_checked(model, tokenizer, data_dir):
    log = evaluate_tofu(
        model.train(), tokenizer, sources={"forget": "forget01_perturbed"}, data_dir=data_dir, limit=1, max_length=60
    )
    assert list(log) == ["eval_log_forget.json"] and model.training
    assert log["eval_log_forget.json"]["generated_text"]["0"][0].startswith("What")  # "plain", which a GPT-Neo gets
    with pytest.raises(ValueError, match=r"sources must have some of the parts retain, .* got author"):
        evaluate_tofu(model, tokenizer, sources={"author": "full"}, data_dir=data_dir)
    with pytest.raises(ValueError, match="line 1 of the forget source has no paraphrased_answer"):
        evaluate_tofu(model, tokenizer, sources={"forget": "forget01"}, data_dir=data_dir)
    with pytest.raises(ValueError, match=r"prompt must be one of .*phi.* got 'gpt'"):
        evaluate_tofu(model, tokenizer, "gpt", data_dir=data_dir)
