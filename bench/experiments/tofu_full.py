"""Figure 5 of LoKU's paper in a few minutes of one large GPU: methods and ranks on TOFU, forget quality and utility.

    python -m bench.experiments.tofu_full --data DATA --output runs/tofu-full [--seconds 450] [--workers 12]

Trains a GPT-Neo of 125M parameters on all of TOFU until it is memorised and, beside it, its reference on retain90; both
also read the questions about real authors and the world, without which a model trained from scratch has no utility to
lose. Then unlearns forget01, forget05 and forget10 with each method and rank, several runs at a time on the one GPU,
and measures the adapter of every epoch, merged into the model. Row weights of FILA are computed once a forget set.

Writes results.json and PNG figures to the folder `report` of --output. A run that fails is told and left out. Once
--seconds are over none is begun, those that run have a minute left, and the report is of what there is; the same
command goes on where it was, with training too, at the last fifth that was saved.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import os
import shlex
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from bench.experiments.pool import Job, Outcome, Pool
from bench.experiments.runs import command, model_config, precision
from bench.experiments.tdec import MODEL as SMALL_MODEL
from bench.experiments.tofu import OTHERS
from bench.experiments.tofu_figures import draw, point
from loku.evaluation import TofuLog, aggregate_tofu, evaluate_tofu, read_log, write_log
from loku.evaluation.tofu import SOURCES
from loku.files import read_json_lines, write_json, write_json_lines
from loku.provenance import hardware, versions
from loku.training.methods import METHODS

RETAIN = {"forget01": "retain99", "forget05": "retain95", "forget10": "retain90"}
TRAINED_ON = {"target": "full", "reference": "retain90"}  # no forget set is in the latter
MOST_TOKENS = {"retain": 100, "forget": 100, "real_authors": 40, "world_facts": 40}
"""Of a question with its generated answer: 99% of the true ones are shorter, and a ruined model takes all of them."""
BATCH = 512  # questions answered at once
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",  # the processes are as many as the cores
    "TOKENIZERS_PARALLELISM": "false",
    # Caches of keys and values grow by a token at a time: without it what 12 processes keep of each size fills a GPU.
    "PYTORCH_ALLOC_CONF": "expandable_segments:True",
}
PATIENCE = 60  # seconds that are left to what runs when the time is over
NEVER = 10**9  # steps
_SHOWN = ("forget_rouge", "forget_probability", "retain_rouge", "retain_probability")
MODEL = SMALL_MODEL | {
    "hidden_size": 768,
    "num_layers": 12,
    "num_heads": 12,
    "attention_types": [[["global", "local"], 6]],
}


class Setting(NamedTuple):
    """Of one unlearning run."""

    forget: str
    method: str
    rank: int

    @property
    def name(self) -> str:
        return f"{self.forget}-{self.method}-{self.rank}"


def main() -> None:
    options = _options()
    began = time.monotonic()
    begin_by, end_by = began + options.seconds, began + options.seconds + PATIENCE
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    (options.output / "report").mkdir(parents=True, exist_ok=True)
    options.model_config = model_config(options.model_config, MODEL, options.output)
    settings = [Setting(f, m, r) for r in options.ranks for f in options.forget for m in options.methods]
    stages: dict[str, float] = {}
    outcomes: list[Outcome] = []
    with Pool(options.workers, options.output / "logs") as pool:
        for stage, jobs in _stages(options, settings).items():
            stage_began = time.monotonic()
            for outcome in pool.run(jobs, begin_by, end_by):
                outcomes.append(outcome)
                _tell(outcome, time.monotonic() - began)
            stages[stage] = round(time.monotonic() - stage_began, 1)
            print(f"{stage}: {stages[stage]} s", flush=True)
            if stage == "training":
                _check_trained(options, outcomes)
        stages["all"] = round(time.monotonic() - began, 1)
        results = {**_collect(options, settings, outcomes), "stages": stages}
        write_json(options.output / "report" / "results.json", results)
    draw(results, options.output / "report")
    _summarise(results)
    print(f"written to {options.output / 'report'}")


def _check_trained(options: argparse.Namespace, outcomes: Sequence[Outcome]) -> None:
    """There is nothing to unlearn without both models, nor from one that has memorised nothing."""
    if any(outcome.error for outcome in outcomes):
        raise SystemExit("a model failed to train")
    for name in TRAINED_ON:
        losses = (line.get("loss") for line in read_json_lines(options.output / name / "metrics.jsonl"))
        print(f"{name}, loss by epoch:", *(f"{loss:.2f}" for loss in losses if loss is not None), flush=True)
    results = json.loads((options.output / "target" / "results.json").read_text())
    perplexity = results["after"]["train_perplexity"]
    if perplexity > options.memorised:
        raise SystemExit(f"the target's perplexity on what it was trained on is {perplexity:.2f}: nothing to unlearn")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=Path("runs/tofu-full"))
    parser.add_argument("--seconds", type=float, default=450, help="after which no run is begun")
    parser.add_argument("--workers", type=int, default=12, help="processes that share the GPU")
    parser.add_argument("--forget", nargs="+", choices=RETAIN, default=["forget10", "forget05", "forget01"])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["ga", "gd", "ihl", "gd+fila", "loku"])
    parser.add_argument("--ranks", type=int, nargs="+", default=[16, 4, 32, 8], help="in the order they are run in")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model_config", type=Path, help="YAML or JSON; by default GPT-Neo 125M's shape")
    parser.add_argument("--target_epochs", type=int, default=30)  # from the 20th on its loss was below 0.1
    parser.add_argument("--target_learning_rate", default="3e-4")  # at 1e-3 it stayed at a perplexity of 139
    parser.add_argument(
        "--memorised", type=float, default=1.5, help="highest perplexity of a target that is gone on with"
    )
    parser.add_argument("--target_batch_size", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--learning_rate", default="1e-3")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--limit", type=int, default=100, help="most samples of each part that utility is made of")
    parser.add_argument("--forget_limit", type=int, default=400, help="most samples that forget quality is made of")
    return parser.parse_args()


def _stages(options: argparse.Namespace, settings: Sequence[Setting]) -> dict[str, list[Job]]:
    training = [Job(name, train, (options, name)) for name in TRAINED_ON]
    preparation = [Job(f"{m}-{f}", measure_whole, (options, m, f)) for f in options.forget for m in TRAINED_ON]
    if any(METHODS[method].fila for method in options.methods):
        preparation += [Job(f"importance-{forget}", importance, (options, forget)) for forget in options.forget]
    unlearning = [Job(setting.name, unlearn, (options, setting)) for setting in settings]
    return {"training": training, "preparation": preparation, "unlearning": unlearning}


def train(options: argparse.Namespace, name: str) -> str:
    """The target or the reference."""
    words = (
        "finetune",
        *("--model_config", options.model_config, "--tokenizer", options.data / "gpt2_tokenizer"),
        *("--train", TRAINED_ON[name], *OTHERS, "--num_train_epochs", options.target_epochs, "--seed", options.seed),
        *("--learning_rate", options.target_learning_rate, "--lr_scheduler_type", "cosine", "--warmup_steps", 0.1),
        *("--per_device_train_batch_size", options.target_batch_size),
        *("--save_strategy", "steps", "--save_steps", 0.2, "--save_total_limit", 1),
        *_common(options),
    )
    command(options.output / name, *words)
    return _line(options.output / name, words)


def importance(options: argparse.Namespace, forget: str) -> str:
    """Row weights for both methods with FILA at every rank."""
    return _command(
        options.output / f"importance-{forget}",
        "importance",
        *("--model", options.output / "target" / "model", "--forget", forget, "--retain", RETAIN[forget]),
        *("--seed", options.seed, *_data(options)),
    )


def unlearn(options: argparse.Namespace, setting: Setting) -> str:
    """The run, without evaluations but at its start on one sample; then the metrics after each epoch."""
    folder, target = _folder(options, setting), options.output / "target" / "model"
    weights = options.output / f"importance-{setting.forget}" / "importance.safetensors"
    line = _command(
        folder,
        "unlearn",
        *("--model", target, "--forget", setting.forget, "--retain", RETAIN[setting.forget]),
        *("--method", setting.method, "--rank", setting.rank, "--seed", options.seed),
        *(("--importance", weights) if METHODS[setting.method].fila else ()),
        *("--learning_rate", options.learning_rate, "--warmup_steps", 0.2, "--num_train_epochs", options.epochs),
        *("--per_device_train_batch_size", options.batch_size, "--evaluate_every", NEVER, "--limit", 1),
        *("--save_strategy", "epoch", "--save_only_model", "true", *_common(options)),
    )
    reference = read_log(_log(options, "reference", setting.forget))
    for checkpoint in sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.partition("-")[2])):
        state = json.loads((checkpoint / "trainer_state.json").read_text())
        merged = PeftModel.from_pretrained(copy.deepcopy(_model(target)), checkpoint).merge_and_unload()
        metrics = aggregate_tofu(measure(options, merged, setting.forget), reference)
        lines = read_json_lines(folder / "evaluations.jsonl")
        new = {"epoch": round(state["epoch"]), "step": state["global_step"], **metrics}
        write_json_lines(folder / "evaluations.jsonl", [*lines, new])
        shutil.rmtree(checkpoint)
    return line


def measure_whole(options: argparse.Namespace, name: str, forget: str) -> None:
    """TOFU's log of the target or the reference."""
    path = _log(options, name, forget)
    if not path.exists():
        write_log(measure(options, _model(options.output / name / "model"), forget), path)


def measure(options: argparse.Namespace, model: PreTrainedModel, forget: str) -> TofuLog:
    tokenizer = _tokenizer(options.output / "target" / "model")
    log: TofuLog = {}
    with _tensor_cores():
        for part, source in {**SOURCES, "forget": f"{forget}_perturbed"}.items():
            log |= evaluate_tofu(
                model,
                tokenizer,
                "phi",
                sources={part: source},
                data_dir=options.data,
                limit=options.forget_limit if part == "forget" else options.limit,
                max_length=MOST_TOKENS[part],
                batch_size=BATCH,
            )
    return log


@contextmanager
def _tensor_cores() -> Iterator[None]:
    """TF32 inside. Not for FILA's initialisation, which takes from the weights what the adapter gives back."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@functools.cache
def _model(path: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(path).to("cuda" if torch.cuda.is_available() else "cpu").eval()


@functools.cache
def _tokenizer(path: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(path)


def _command(folder: Path, *words: object) -> str:
    """Run the command, from its beginning where it was broken off; returns it as a line."""
    if folder.exists() and not (folder / "results.json").exists():
        shutil.rmtree(folder)
    command(folder, *words)
    return _line(folder, words)


def _line(folder: Path, words: Sequence[object]) -> str:
    return f"loku {shlex.join([*map(str, words), '--output_dir', str(folder)])}"


def _data(options: argparse.Namespace) -> tuple[object, ...]:
    return "--data_dir", options.data, "--prompt", "phi", "--max_length", 256


def _common(options: argparse.Namespace) -> tuple[object, ...]:
    quiet = "--report_to", "none", "--disable_tqdm", "true", "--logging_strategy", "epoch"
    return *precision(), *quiet, *_data(options)


def _folder(options: argparse.Namespace, setting: Setting) -> Path:
    return options.output / "runs" / setting.name


def _log(options: argparse.Namespace, name: str, forget: str) -> Path:
    return options.output / "logs" / f"{name}-{forget}.json"


def _tell(outcome: Outcome, elapsed: float) -> None:
    print(f"[{elapsed:.0f} s] {outcome.name}: {outcome.error or f'{outcome.seconds:.1f} s'}", flush=True)
    if outcome.value is not None:
        print(f"    {outcome.value}", flush=True)


def _summarise(results: dict[str, Any]) -> None:
    """A line for what was there before, and for each run's last epoch."""
    lines = [(f"{name}, {forget}", metrics) for name in TRAINED_ON for forget, metrics in results[name].items()]
    for run in (run for run in results["runs"] if run["epochs"]):
        setting = Setting(*(run[key] for key in Setting._fields))
        lines.append((f"{setting.name}, epoch {run['epochs'][-1]['epoch']}", run["epochs"][-1]))
    for name, metrics in lines:
        utility, quality = point(metrics)
        others = ", ".join(f"{key} {metrics[key]:.3f}" for key in _SHOWN)
        print(f"{name}: model_utility {utility:.3f}, log10 forget_quality {quality:.2f}, {others}")
    print(f"{sum(bool(run['epochs']) for run in results['runs'])} of {len(results['runs'])} runs were measured")


def _collect(options: argparse.Namespace, settings: Sequence[Setting], outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Everything that was measured, plain."""
    whole: dict[str, dict[str, Any]] = {name: {} for name in TRAINED_ON}
    for forget in options.forget:
        paths = {name: _log(options, name, forget) for name in TRAINED_ON}
        if all(path.exists() for path in paths.values()):
            logs = {name: read_log(path) for name, path in paths.items()}
            for name, log in logs.items():
                whole[name][forget] = aggregate_tofu(log, logs["reference"])
    seconds = {outcome.name: round(outcome.seconds, 1) for outcome in outcomes if outcome.error is None}
    runs = [
        {
            **setting._asdict(),
            "seconds": seconds.get(setting.name),
            "epochs": read_json_lines(_folder(options, setting) / "evaluations.jsonl"),
        }
        for setting in settings
    ]
    training = {name: json.loads((options.output / name / "results.json").read_text()) for name in TRAINED_ON}
    failures = {outcome.name: outcome.error for outcome in outcomes if outcome.error is not None}
    about = {"options": vars(options), "versions": versions(("torch", "transformers", "peft")), "hardware": hardware()}
    about = json.loads(json.dumps(about, default=str))
    return {**about, "training": training, **whole, "runs": runs, "failures": failures}


if __name__ == "__main__":
    main()
