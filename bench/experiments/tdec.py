"""Unlearning 32 sequences of the Training Data Extraction Challenge that a small GPT-Neo has memorised.

    python -m bench.experiments.tdec --data DATA --output runs/tdec [--seeds 0 1 2] [--methods loku gd ihl gd+fila]

Trains a GPT-Neo of 4 layers x 256, or the --model_config given, on WikiText-2 and, over and over, the 32 sequences,
until the mean MA on them exceeds 0.9; then unlearns until EL_10 and MA are at or below those of 32 sequences that it
never saw, with each method and seed at one rank; then compares them. DATA has the folders tdec, wikitext2 and
gpt2_tokenizer. Broken off, it goes on where it was.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from bench.experiments.runs import command, model_config, precision, report
from loku.training import METHODS

FORGET, UNSEEN = "tdec[0:32]", "tdec[32:64]"
RETAIN, ALSO_READ, TEXT = "wikitext2:validation", "wikitext2:test[10:]", "wikitext2:test[0:10]"
REPEATS = 14  # of the forget sequences in an epoch of the target's training
MODEL = {
    "model_type": "gpt_neo",
    "hidden_size": 256,
    "num_layers": 4,
    "num_heads": 8,
    "attention_types": [[["global", "local"], 2]],
    "max_position_embeddings": 256,
    "window_size": 256,
    "embed_dropout": 0.0,
    "attention_dropout": 0.0,
    "resid_dropout": 0.0,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=Path("runs/tdec"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", default=["loku", "ihl", "gd", "gd+fila"], choices=METHODS)
    parser.add_argument("--model_config", type=Path, help="YAML or JSON, instead of the small GPT-Neo")
    parser.add_argument("--target_epochs", type=int, default=5)
    parser.add_argument("--target_learning_rate", default="1e-3")
    parser.add_argument("--epochs", type=int, default=20, help="most epochs of unlearning")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--learning_rate", default="1e-3")
    options = parser.parse_args()

    options.output.mkdir(parents=True, exist_ok=True)
    config = model_config(options.model_config, MODEL, options.output)
    tokenizer = options.data / "gpt2_tokenizer"
    data = ["--data_dir", options.data, "--max_length", 200]
    target = options.output / "target"
    command(
        target,
        "finetune",
        *("--model_config", config, "--tokenizer", tokenizer),
        *("--train", RETAIN, ALSO_READ, *[FORGET] * REPEATS, "--num_train_epochs", options.target_epochs),
        *("--per_device_train_batch_size", 8, "--learning_rate", options.target_learning_rate),
        *("--lr_scheduler_type", "cosine", *precision()),
        *("--save_strategy", "epoch", "--save_total_limit", 1, "--report_to", "none", *data),
    )
    unseen = options.output / "unseen"
    command(unseen, "evaluate", "--model", target / "model", "--benchmark", "tdec", "--forget", UNSEEN, *data)
    goal = json.loads((unseen / "results.json").read_text())["after"]
    runs = []
    for seed in options.seeds:
        for method in options.methods:
            run = options.output / f"{method}-{seed}"
            command(
                run,
                "unlearn",
                *("--model", target / "model", "--method", method, "--seed", seed),
                *("--forget", FORGET, "--retain", RETAIN, "--text", TEXT, "--limit", 32),
                *("--benchmark", "tdec", "--el_threshold", goal["el_10"], "--ma_threshold", goal["ma"]),
                *("--rank", options.rank, "--learning_rate", options.learning_rate),
                *("--num_train_epochs", options.epochs, "--per_device_train_batch_size", 8, *precision()),
                *("--save_strategy", "epoch", "--save_total_limit", 1, "--report_to", "none", *data),
            )
            runs.append(run)
    report(runs, options.output / "report", "TDEC", [("retain_loss", "ma"), ("perplexity", "ma")])


if __name__ == "__main__":
    main()
