"""The classification tasks: lm-eval itself where it is installed, and what is asked of it where it is not."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch
from datasets import Dataset, DatasetDict
from transformers import GPTNeoConfig, GPTNeoForCausalLM

from loku.demo.tokenizer import train_tokenizer
from loku.evaluation import lm_eval_tasks
from loku.evaluation.harness import NINE_TASKS

COPA = [
    ("The man broke his toe.", "cause", "He got a hole in his sock.", "He dropped a hammer on his foot.", 1),
    ("The tap was left open.", "effect", "The bath ran over.", "The towel fell off the hook.", 0),
    ("The woman hired a lawyer.", "cause", "She decided to sue her boss.", "She decided to run for office.", 0),
    ("The pond froze over.", "effect", "People skated on the pond.", "People brought boats to the pond.", 0),
]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([text for row in COPA for text in (row[0], *row[2:4])], vocabulary=320)


@pytest.fixture
def model(tokenizer):
    torch.manual_seed(0)
    attention = {"attention_types": [[["global", "local"], 1]], "num_layers": 2, "num_heads": 2}
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 32, "max_position_embeddings": 128, "initializer_range": 0.2}
    return GPTNeoForCausalLM(GPTNeoConfig(**sizes, **attention, bos_token_id=0, eos_token_id=0)).train()


def log_likelihood(model, tokenizer, context: str, continuation: str) -> float:
    start = len(tokenizer(context).input_ids)
    ids = torch.tensor(tokenizer(context + continuation).input_ids)
    log_p = model(ids[None]).logits[0, :-1].log_softmax(-1)
    return log_p.gather(1, ids[1:, None])[start - 1 :].sum().item()


@torch.no_grad()
def test_lm_eval_measures_what_the_model_prefers(model, tokenizer, monkeypatch):
    tasks = pytest.importorskip("lm_eval.tasks", reason="the extra lm-eval is not installed")
    assert set(NINE_TASKS) <= set(tasks.TaskManager().all_tasks)
    names = ("premise", "question", "choice1", "choice2", "label")
    rows = Dataset.from_list([dict(zip(names, row, strict=True)) for row in COPA])
    splits = DatasetDict({"train": rows, "validation": rows})
    monkeypatch.setattr("lm_eval.api.task.datasets.load_dataset", lambda *args, **options: splits)
    found = lm_eval_tasks(model, tokenizer, ["copa"], batch_size=3)
    assert model.training

    model.eval()
    right = 0
    for premise, question, *choices, label in COPA:
        context = f"{premise[:-1]} {'because' if question == 'cause' else 'therefore'}"
        choices = [f"  {text[0].lower()}{text[1:]}" for text in choices]  # a blank of the task, one of lm-eval
        scores = [log_likelihood(model, tokenizer, context, text) for text in choices]
        right += scores[label] > scores[1 - label]
    assert found == {"copa": right / len(COPA)}


def test_lm_eval_is_an_extra(model, tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ImportError, match=r"pip install 'loku-kernels\[lm-eval\]'"):
        lm_eval_tasks(model, tokenizer)


def test_lm_eval_is_asked_for_accuracy(model, tokenizer, monkeypatch):
    """With a stand-in for the package, which need not be installed."""
    asked = {}

    def simple_evaluate(model, tasks, **options):
        asked.update(model=model, tasks=tasks, **options)
        return {"results": {task: {"alias": task, "acc,none": 0.25, "acc_norm,none": 0.5} for task in tasks}}

    package, models = ModuleType("lm_eval"), ModuleType("lm_eval.models.huggingface")
    package.simple_evaluate, models.HFLM = simple_evaluate, lambda **options: options
    monkeypatch.setitem(sys.modules, "lm_eval", package)
    monkeypatch.setitem(sys.modules, "lm_eval.models.huggingface", models)
    assert lm_eval_tasks(model, tokenizer, ["piqa"], limit=3, seed=5) == {"piqa": 0.25}
    assert asked["model"]["pretrained"] is model and asked["limit"] == 3 and asked["num_fewshot"] == 0
    assert {value for name, value in asked.items() if name.endswith("random_seed")} == {5}
    assert model.training
