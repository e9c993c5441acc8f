"""Small models with their tokenizer, data in the published formats, and the commands' options for quick runs."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from loku.demo.people import invent
from loku.demo.tokenizer import train_tokenizer

FAMILIES = ("gpt_neo", "phi", "llama")
QUICK = (
    "--use_cpu", "--report_to", "none", "--disable_tqdm", "true", "--max_steps", "2", "--learning_rate", "1e-2",
    "--per_device_train_batch_size", "2", "--logging_steps", "1", "--save_strategy", "no", "--seed", "3", "--rank", "4",
    "--limit", "2",
)  # fmt: skip
_COMMON = {"hidden_size": 32, "max_position_embeddings": 64, "initializer_range": 0.15}
_LAYERS = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
CONFIGS = {
    "gpt_neo": {"num_layers": 2, "num_heads": 2, "attention_types": [[["global", "local"], 1]], "window_size": 16},
    "phi": _LAYERS,
    "llama": {**_LAYERS, "num_key_value_heads": 1},
}
_WRONG = ["Nobody knows that.", "It was a Tuesday in the north.", "The lighthouse keeper."]


@dataclass(frozen=True)
class Workshop:
    """Folders ``gpt_neo``, ``phi``, ``llama`` (with the tokenizer) and ``tokenizer``; ``model.yaml``; ``forget.jsonl``
    and ``retain.jsonl`` (questions), ``forget_text.jsonl`` and ``retain_text.jsonl``; ``tofu``, ``tdec``,
    ``wikitext2``."""

    root: Path

    def __truediv__(self, name: str) -> Path:
        return self.root / name

    @classmethod
    def make(cls, root: Path) -> Workshop:
        records = [record for person in invent(6) for record in person.records()[:2]]
        texts = [f"{record['question']}\n{record['answer']}" for record in records]
        tokenizer = train_tokenizer(texts, vocabulary=400)
        tokenizer.save_pretrained(root / "tokenizer")
        special = {"vocab_size": len(tokenizer), "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
        for family in FAMILIES:
            torch.manual_seed(1)
            config = AutoConfig.for_model(family, **_COMMON, **CONFIGS[family], **special)
            AutoModelForCausalLM.from_config(config).save_pretrained(root / family)
            tokenizer.save_pretrained(root / family)
        (root / "model.yaml").write_text(json.dumps({"model_type": "gpt_neo", **_COMMON, **CONFIGS["gpt_neo"]}))
        write_lines(root / "forget.jsonl", records[:4])
        write_lines(root / "retain.jsonl", records[4:])
        write_lines(root / "forget_text.jsonl", [{"text": text} for text in texts[:4]])
        write_lines(root / "retain_text.jsonl", [{"text": text} for text in texts[4:]])
        (root / "tofu").mkdir()
        for split in ("full", "forget01", "retain99"):
            write_lines(root / "tofu" / f"{split}.json", records[:4])
        for split in ("forget01", "retain", "real_authors", "world_facts"):
            more = {"paraphrased_answer": "It is said so.", "perturbed_answer": _WRONG}
            write_lines(root / "tofu" / f"{split}_perturbed.json", [{**record, **more} for record in records[:3]])
        draw = np.random.default_rng(0)
        (root / "tdec").mkdir()
        for part, length in (("val_preprefix", 12), ("val_prefix", 6), ("val_suffix", 6)):
            np.save(root / "tdec" / f"{part}.npy", draw.integers(0, 300, (6, length)).astype(np.uint16))
        (root / "wikitext2").mkdir()
        (root / "wikitext2" / "test.txt").write_text(" \n = A town = \n \n" + " ".join(texts) + "\n")
        return cls(root)

    def unlearn(self, method: str, output: Path, *options: object, family: str = "llama") -> list[object]:
        """The words of a quick run. On texts, as it takes a while to generate answers to questions."""
        return [
            "unlearn", "--model", self / family, "--method", method, *self.texts,
            "--output_dir", output, *QUICK, *options,
        ]  # fmt: skip

    @property
    def texts(self) -> list[object]:
        return ["--forget", self / "forget_text.jsonl", "--retain", self / "retain_text.jsonl"]

    @property
    def questions(self) -> list[object]:
        return ["--forget", self / "forget.jsonl", "--retain", self / "retain.jsonl"]


def write_lines(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


def logged(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def same_weights(folder: Path, other: Path, name: str = "adapter/adapter_model.safetensors") -> bool:
    """Bit for bit."""
    mine, theirs = load_file(folder / name), load_file(other / name)
    return mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)


def shared_data() -> Path:
    """Folder of the real data sets; skips the test where there is none."""
    folder = Path(os.environ.get("LOKU_DATA", Path(__file__).parents[3] / "shared" / "data"))
    if not (folder / "tofu").is_dir():
        pytest.skip("no data sets: neither LOKU_DATA nor ../shared/data has them")
    return folder
