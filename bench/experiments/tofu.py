"""Unlearning authors of TOFU that a small GPT-Neo has memorised.

    python -m bench.experiments.tofu --data DATA --output runs/tofu [--forget forget01] [--seeds 0 1 2] [--methods ...]

Of the 200 authors it takes the first ten, to be kept, and the last ones, who are the forget set. Trains a GPT-Neo of
4 layers x 256 on both, and its reference on the former alone; both also read the questions about real authors and the
world, without which a model trained from scratch has no utility to lose, and unlearning never sees those. Then unlearns
with each method and seed, with model utility and forget quality after each epoch, and plots them. DATA has the folders
tofu and gpt2_tokenizer. Broken off, it goes on where it was.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from bench.experiments.runs import command, model_config, report
from bench.experiments.tdec import MODEL
from loku.training import METHODS

RETAIN = "full[0:200]"  # the first half of the questions of retain_perturbed
OTHERS = ("real_authors", "world_facts")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=Path("runs/tofu"))
    parser.add_argument("--forget", choices=("forget01", "forget05", "forget10"), default="forget05")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", default=["loku", "ihl", "gd", "gd+fila"], choices=METHODS)
    parser.add_argument("--target_epochs", type=int, default=30)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--learning_rate", default="1e-3")
    parser.add_argument("--limit", type=int, default=30, help="most samples of each part of the evaluation")
    options = parser.parse_args()

    options.output.mkdir(parents=True, exist_ok=True)
    config = model_config(None, MODEL, options.output)
    tokenizer = options.data / "gpt2_tokenizer"
    data = ["--data_dir", options.data, "--prompt", "phi", "--max_length", 256]
    for name, train in (("target", [RETAIN, *OTHERS, options.forget]), ("reference", [RETAIN, *OTHERS])):
        command(
            options.output / name,
            "finetune",
            *("--model_config", config, "--tokenizer", tokenizer),
            *("--train", *train, "--num_train_epochs", options.target_epochs, "--learning_rate", "1e-3"),
            *("--per_device_train_batch_size", 16, "--lr_scheduler_type", "cosine"),
            *("--save_strategy", "epoch", "--save_total_limit", 1, "--report_to", "none", *data),
        )
    log = options.output / "reference-log"
    evaluation = ["--benchmark", "tofu", "--forget", options.forget, "--limit", options.limit]
    command(log, "evaluate", "--model", options.output / "reference" / "model", *evaluation, *data)
    runs = []
    for seed in options.seeds:
        for method in options.methods:
            run = options.output / f"{method}-{seed}"
            command(
                run,
                "unlearn",
                *("--model", options.output / "target" / "model", "--method", method, "--seed", seed),
                *("--retain", RETAIN, "--retain_log", log / "eval_log_aggregated.json", *evaluation),
                *("--rank", options.rank, "--learning_rate", options.learning_rate, "--warmup_steps", 0.2),
                *("--num_train_epochs", options.epochs, "--per_device_train_batch_size", 16),
                *("--save_strategy", "epoch", "--save_total_limit", 1, "--report_to", "none", *data),
            )
            runs.append(run)
    figures = [("retain_rouge", "forget_rouge"), ("model_utility", "log10_forget_quality")]
    report(runs, options.output / "report", f"TOFU {options.forget}", figures)


if __name__ == "__main__":
    main()
