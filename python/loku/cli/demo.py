"""``loku demo``: from nothing to an unlearned model and a report, with the commands that a user would type."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import dataclass, fields
from pathlib import Path

from peft import PeftModel
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import AutoModelForCausalLM, AutoTokenizer

from loku.cli import finetune, report, unlearn
from loku.cli.errors import CommandError, blaming
from loku.cli.options import as_dict, option, parse
from loku.cli.run_folder import RunFolder, run_stage
from loku.cli.settings_files import read_mapping
from loku.data import PROMPTS
from loku.demo.people import Person, invent
from loku.demo.tokenizer import train_tokenizer
from loku.evaluation import generate_greedily
from loku.files import filling

_METHODS = ("loku", "gd")
# config.yaml is written first and deleted last: it tells that the others are a demo's.
_WRITTEN = ("corpus", "target", *_METHODS, "report", "versions.json", "config.yaml")
_PROMPT = "plain"
_ANSWER_LENGTH = 40  # tokens of a question and its answer that are shown
_MODEL = {
    "model_type": "gpt_neo",
    "hidden_size": 128,
    "num_layers": 4,
    "num_heads": 4,
    "attention_types": [[["global", "local"], 2]],
    "max_position_embeddings": 128,
    "window_size": 64,
    "embed_dropout": 0.0,
    "attention_dropout": 0.0,
    "resid_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


@dataclass
class DemoRun:
    """How large, and where to."""

    output_dir: str = option("runs/demo", "folder for the corpus, the model, the runs and the report")
    people: int = option(40, "how many people are invented")
    forget: int = option(4, "how many of them must be forgotten")
    memorise_epochs: int = option(60, "epochs of training on all of them")
    unlearn_epochs: int = option(12, "epochs of unlearning")
    seed: int = option(0, "of the people, the model and the training")
    overwrite: bool = option(False, "delete what an earlier demo left in output_dir")
    resume: bool = option(False, "go on with what an earlier demo left in output_dir")


def main(argv: list[str]) -> None:
    """Invent people, train a small GPT-Neo until it knows them by heart, and unlearn some, with LoKU and with gradient
    difference. Needs no network and no data; takes a few minutes on two cores.
    """
    (demo,) = parse("demo", [DemoRun], argv, main.__doc__)
    if not 0 < demo.forget < demo.people:
        raise CommandError(f"--forget must be from 1 to people - 1 = {demo.people - 1}, but is {demo.forget}")
    with blaming("--people"):
        people = invent(demo.people, demo.seed)
    folder, console, started = Path(demo.output_dir), Console(), time.monotonic()
    if demo.overwrite:
        _clear(folder)
        demo.overwrite = False  # once: not where the run goes on
    elif not demo.resume and folder.exists():
        raise CommandError(f"{folder} exists: choose another --output_dir, go on with --resume, or give --overwrite")
    config = as_dict(demo)
    run = RunFolder(folder, demo.resume, outputs=_WRITTEN)
    run.begin(config, config.keys() - {"output_dir", "overwrite", "resume"})
    corpus = write_corpus(folder / "corpus", people, demo.forget)
    console.print(f"{demo.people} people were invented, of whom {demo.forget} must be forgotten.")

    common = ["--data_dir", folder / "corpus", "--prompt", _PROMPT, "--max_length", 96, "--seed", demo.seed]
    common += ["--save_strategy", "steps", "--save_steps", 0.25, "--save_total_limit", 1, "--report_to", "none"]
    _memorise(demo, folder, common)
    for method in _METHODS:
        _unlearn(method, demo, folder, common)
    runs = [str(folder / method) for method in _METHODS]
    report.main(["--runs", *runs, "--output", str(folder / "report"), "--title", "Unlearning invented people"])
    console.print(answers(folder, corpus))
    print(f"{time.monotonic() - started:.0f} seconds; see {folder / 'report' / 'report.html'}")


def _clear(folder: Path) -> None:
    """Delete what an earlier demo wrote, and nothing else. Raises CommandError where what is there is none's."""
    if not folder.exists():
        return
    if not folder.is_dir() or (any(folder.iterdir()) and not _is_of_a_demo(folder)):
        raise CommandError(
            f"--output_dir {folder} is not what a demo left, which --overwrite would delete: choose another folder"
        )
    for path in (folder / name for name in _WRITTEN):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _is_of_a_demo(folder: Path) -> bool:
    """Whether its config.yaml has a demo's options."""
    path = folder / "config.yaml"
    options = {field.name for field in fields(DemoRun)}
    return path.is_file() and options <= read_mapping(path, "output_dir's").keys()


def write_corpus(folder: Path, people: list[Person], forget: int) -> dict[str, list[dict[str, str]]]:
    """forget.jsonl, retain.jsonl, model.json, and the tokenizer, in ``folder``."""
    parts = {"forget": people[:forget], "retain": people[forget:]}
    corpus = {part: [record for person in group for record in person.records()] for part, group in parts.items()}
    texts = [f"{record['question']}\n{record['answer']}" for part in corpus.values() for record in part]
    with filling(folder) as new:
        for part, records in corpus.items():
            (new / f"{part}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        (new / "model.json").write_text(json.dumps(_MODEL, indent=1))
        train_tokenizer(texts, vocabulary=1024).save_pretrained(new / "tokenizer")
    return corpus


def answers(folder: Path, corpus: dict[str, list[dict[str, str]]]) -> Table:
    """What each model says to a question about someone forgotten, and about someone kept."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "target" / "model")
    table = Table("", "question", "before", *_METHODS, title="Greedy answers", show_lines=True)
    asked = [(part, record["question"]) for part, records in corpus.items() for record in records[:2]]
    prompts = [PROMPTS[_PROMPT].question(question) for _, question in asked]
    columns = []
    for method in (None, *_METHODS):
        model = AutoModelForCausalLM.from_pretrained(folder / "target" / "model")
        if method is not None:
            model = PeftModel.from_pretrained(model, folder / method / "adapter")
        columns.append(generate_greedily(model, tokenizer, prompts, max_length=_ANSWER_LENGTH))
    for (part, question), *said in zip(asked, *columns, strict=True):
        table.add_row(part, *map(Text, (question, *said)))  # as it is: no markup
    return table


def _memorise(demo: DemoRun, folder: Path, common: list[object]) -> None:
    corpus = folder / "corpus"
    run_stage(
        finetune.main,
        folder / "target",
        *("--tokenizer", corpus / "tokenizer", "--model_config", corpus / "model.json"),
        *("--train", corpus / "forget.jsonl", corpus / "retain.jsonl"),
        *("--num_train_epochs", demo.memorise_epochs),
        *("--learning_rate", "2e-3", "--per_device_train_batch_size", 16),
        *common,
    )


def _unlearn(method: str, demo: DemoRun, folder: Path, common: list[object]) -> None:
    corpus = folder / "corpus"
    run_stage(
        unlearn.main,
        folder / method,
        *("--model", folder / "target" / "model", "--method", method),
        *("--forget", corpus / "forget.jsonl", "--retain", corpus / "retain.jsonl"),
        *("--num_train_epochs", demo.unlearn_epochs),
        *("--learning_rate", "5e-4", "--per_device_train_batch_size", 4, "--rank", 16),
        *common,
    )
