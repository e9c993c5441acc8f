"""The longer examples of the README run as they stand."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, GPTNeoConfig, GPTNeoForCausalLM

from loku.demo.people import invent
from loku.demo.tokenizer import train_tokenizer

README = Path(__file__).parents[1] / "README.md"


def _example(first_line: str) -> str:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)
    return next(block for block in blocks if block.startswith(first_line))


def test_unlearning_in_a_dozen_lines(tmp_path, monkeypatch):
    people = invent(4)
    records = {"forget": people[0].records(), "retain": [r for person in people[1:] for r in person.records()]}
    texts = []
    for part, of in records.items():
        (tmp_path / f"{part}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in of))
        texts += [text for record in of for text in record.values()]
    tokenizer = train_tokenizer(texts, 400)
    config = GPTNeoConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_layers=2, num_heads=2, attention_types=[[["global"], 2]]
    )
    model = GPTNeoForCausalLM(config)
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    names = {"name": str(tmp_path / "model")}
    exec(_example("from peft import LoraConfig"), names)
    ids = torch.tensor([tokenizer(texts[0]).input_ids])
    trained = names["model"].eval().cpu()
    reloaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(names["name"]), "adapter").eval()
    with torch.no_grad():
        torch.testing.assert_close(reloaded(ids).logits, trained(ids).logits, rtol=1e-4, atol=1e-4)


def test_the_kernels_in_a_line():
    hidden, labels = torch.randn(2, 5, 8, requires_grad=True), torch.randint(0, 11, (2, 5))
    model = torch.nn.Module()
    model.lm_head = torch.nn.Linear(8, 11, bias=False)
    forget = torch.tensor([[1.0], [0.0]])
    exec(_example("from loku_kernels import"), {"hidden": hidden, "labels": labels, "model": model, "forget": forget})
    assert hidden.grad.abs().sum() > 0
