"""What the experiments share: `loku` commands run once, and again only where they did not come to their end."""

from __future__ import annotations

import shlex
from pathlib import Path

from transformers import GPT2Tokenizer

from loku.cli import main


def gpt2_tokenizer(data: Path, output: Path) -> Path:
    """The tokenizer of ``data/gpt2_tokenizer``, bare vocabulary and merges, as a folder that loads by itself."""
    folder = output / "tokenizer"
    if not folder.exists():
        GPT2Tokenizer.from_pretrained(data / "gpt2_tokenizer").save_pretrained(folder)
    return folder


def command(folder: Path, name: str, *arguments: object) -> None:
    """Run ``loku name ... --output_dir folder``, unless its results are there; go on where it was broken off."""
    if (folder / "results.json").exists():
        return
    words = [name, *map(str, arguments), "--output_dir", str(folder)]
    if (folder / "config.yaml").exists() and name != "evaluate":
        words.append("--resume")
    print("loku", shlex.join(words), flush=True)
    if main(words) != 0:
        raise SystemExit(1)
