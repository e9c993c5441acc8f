"""What options may be, where their types do not say: checked before anything is loaded or written."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, Trainer, TrainingArguments, get_scheduler
from transformers.integrations import get_reporting_integration_callbacks

from loku.cli.errors import CommandError, blaming, warn


@dataclass(frozen=True)
class _Check:
    what: str
    holds: Callable[[Any], bool]


_POSITIVE = _Check("positive", lambda value: value > 0)
_POSITIVE_NUMBER = _Check("positive and finite", lambda value: 0 < value < math.inf)
_NOT_NEGATIVE = _Check("finite and not negative", lambda value: 0 <= value < math.inf)
_FINITE = _Check("finite", math.isfinite)
_DECAY = _Check("from 0 to below 1", lambda value: 0 <= value < 1)
_LENGTH = _Check("at least 2", lambda value: value >= 2)  # the first token is never scored
_SEED = _Check("from 0 to 2**32 - 1", lambda value: 0 <= value < 2**32)
_INTERVAL = _Check(
    "epoch or a number of steps", lambda value: value == "epoch" or (value.isdecimal() and int(value) > 0)
)
_UNSET = _Check("false, as the trainer has no evaluation set", lambda value: not value)
_NO_EVALUATION = _Check("no, as the trainer has no evaluation set: see --evaluate_every", lambda value: value == "no")
_NOT_BEST = _Check("no, epoch or steps, as the trainer has no evaluation set", lambda value: value != "best")
_STEPS = _Check("positive, or -1 for as many as the epochs have", lambda value: value == -1 or value > 0)
_BY_RESUME = _Check("left out: --resume goes on from the last checkpoint in --output_dir", lambda value: not value)

_CHECKS = {
    "limit": _POSITIVE,
    "evaluate_every": _INTERVAL,
    "eval_on_start": _UNSET,
    "eval_strategy": _NO_EVALUATION,
    "save_strategy": _NOT_BEST,
    "max_steps": _STEPS,
    "resume_from_checkpoint": _BY_RESUME,
    "el_threshold": _FINITE,
    "ma_threshold": _FINITE,
    "max_length": _LENGTH,
    "rank": _POSITIVE,
    "alpha": _FINITE,
    "lora_dropout": _DECAY,
    "fila_eps": _POSITIVE_NUMBER,
    "fisher_memory_budget": _POSITIVE,
    "fisher_batch_tokens": _POSITIVE,
    "fisher_save_minutes": _NOT_NEGATIVE,
    "fisher_retain_size": _POSITIVE,
    "seed": _SEED,
    "data_seed": _SEED,
    "per_device_train_batch_size": _POSITIVE,
    "gradient_accumulation_steps": _POSITIVE,
    "dataloader_num_workers": _NOT_NEGATIVE,
    "num_train_epochs": _POSITIVE_NUMBER,
    "learning_rate": _NOT_NEGATIVE,
    "weight_decay": _NOT_NEGATIVE,
    "max_grad_norm": _NOT_NEGATIVE,
    "adam_beta1": _DECAY,
    "adam_beta2": _DECAY,
    "adam_epsilon": _NOT_NEGATIVE,
    "memorise_epochs": _POSITIVE,
    "unlearn_epochs": _POSITIVE,
}


# Command -> option -> the benchmarks that use it, where others do not.
_USED_BY: dict[str, dict[str, tuple[str, ...]]] = {
    "unlearn": {
        "unseen": ("tdec",),
        "el_threshold": ("tdec",),
        "ma_threshold": ("tdec",),
        "retain_log": ("tofu",),
    },
    "evaluate": {
        "forget": ("tofu", "tdec"),
        "retain_log": ("tofu",),
        "definition": ("tofu",),
        "text": ("perplexity",),
    },
}


def check_values(values: Mapping[str, Any]) -> None:
    """Raises CommandError, which names the option, if a value is none that its option may have. None: not given."""
    for name, check in _CHECKS.items():
        value = values.get(name)
        if value is not None and not check.holds(value):
            raise CommandError(f"--{name} must be {check.what}, but is {value}")


def warn_of_unused(command: str, values: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Says which options only another benchmark than the chosen one uses. No error: a preset may have given them."""
    chosen = values.get("benchmark")
    for name, benchmarks in _USED_BY.get(command, {}).items():
        if values.get(name) != defaults.get(name) and chosen not in benchmarks:
            warn(f"--{name} is for --benchmark {' and '.join(benchmarks)}, and has no effect with {chosen}")


def check_training(args: TrainingArguments, resume: bool) -> None:
    """Raises CommandError where the trainer would fail much later, or go on from less than it needs."""
    if resume and args.save_only_model:
        raise CommandError("--resume needs what --save_only_model leaves out of checkpoints, the optimizer's state")
    _check_schedule(args)
    _check_reporters(args)


def _check_reporters(args: TrainingArguments) -> None:
    """Raises CommandError if the package for one is not installed, of which the trainer would only tell much later."""
    with blaming(f"--report_to {' '.join(args.report_to)}", RuntimeError, ImportError):
        for reporter in get_reporting_integration_callbacks(args.report_to):
            reporter()


def check_optimizer(args: TrainingArguments, model: PreTrainedModel) -> None:
    """Raises CommandError if its package is not installed, or it does not fit the model."""
    with blaming(f"--optim {args.optim.value}", ImportError):
        Trainer.get_optimizer_cls_and_kwargs(args, model)


def _check_schedule(args: TrainingArguments) -> None:
    """Make the learning-rate schedule, which the trainer does only once it trains.

    Raises CommandError if --lr_scheduler_kwargs lack what it needs, or have what it does not know.
    """
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=args.learning_rate)
    steps = max(args.max_steps, 1)
    kind = args.lr_scheduler_type
    with blaming(f"--lr_scheduler_type {kind.value} with --lr_scheduler_kwargs {args.lr_scheduler_kwargs}", TypeError):
        get_scheduler(kind, optimizer, args.get_warmup_steps(steps), steps, args.lr_scheduler_kwargs)
