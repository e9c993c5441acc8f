"""LoKU end to end: importance, factors and five epochs, beside the authors' recipe for the same sequences and steps.

The model is a GPT-Neo of 4 layers x 256 with GPT-2's vocabulary and random weights; sequences are TOFU's where the data
are at hand, else drawn with such lengths. Both train rank 16 on all linear layers by AdamW, 8 forget and 8 retain
sequences a step. Of the authors' recipe are measured: the importance of one micro-batch of each set, the factors, and
one training step; the whole is what that comes to, each as often as it is needed. Rows of the role "part" say where
our time goes, in one more run.
"""

from __future__ import annotations

import copy
import functools
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import TrainerCallback

from bench import authors, tofu
from bench.harness import Candidate, Measurement
from loku.data import Example, LanguageModelCollator, PairedDataset, Role, token_budget_batches
from loku.fila import FilaStateDict, get_fila_state_dict, initialize_lora_fila_weights
from loku.fila.targets import lora_layers
from loku.training import UnlearnConfig, UnlearningTrainer

EPOCHS = 5
IMPORTANCE_TOKENS = 1024  # of a batch
LEARNING_RATE, WEIGHT_DECAY = 1e-4, 0.01


class Problem:
    """The base model, pairs of forget and retain sequences, and an adapter that is new for each run."""

    def __init__(self, quick: bool, device: torch.device) -> None:
        layers, size, count, self.batch_size = (2, 64, 4, 2) if quick else (4, 256, 40, 8)
        self.shape, self.device = f"GPT-Neo {layers} x {size}", device
        self.base = tofu.gpt_neo(layers, size).to(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
        self.source, self.forget = tofu.examples("forget01", count)
        _, self.retain = tofu.examples("retain99", 10 * count)
        self.pairs = PairedDataset({Role.FORGET: self.forget, Role.RETAIN: self.retain}, seed=0)
        self.batches = count // self.batch_size
        self.output = tempfile.TemporaryDirectory()
        self.renew()
        self.targets = list(lora_layers(self.model, "default"))

    def of_role(self, role: Role) -> list[Example]:
        return [self.pairs[i][role] for i in range(len(self.pairs))]

    @property
    def flops(self) -> int:
        """Of the products with weights that the work takes: tokens without padding, the head for scored ones only, and
        gradients of weights for importance only."""
        sequences = self.of_role(Role.FORGET) + self.of_role(Role.RETAIN)
        tokens = sum(len(example["input_ids"]) for example in sequences)
        scored = sum(label >= 0 for example in sequences for label in example["labels"])
        body = sum(self.base.get_submodule(name).weight.numel() for name in self.targets)
        head = self.base.lm_head.weight.numel()
        return 2 * ((3 + 2 * EPOCHS) * tokens * body + 2 * (1 + EPOCHS) * scored * head)

    def renew(self) -> None:
        self.model = None  # or there would be two of them for a moment
        self.model = adapted(self.base)

    def ours(self) -> None:
        initialize_lora_fila_weights(self.model, self.importance(), show_progress_bar=False)
        self.trainer().train()

    def importance(self) -> FilaStateDict:
        """Of all forget sequences and as many retain sequences."""
        data = (batches_of(self.of_role(role)) for role in (Role.FORGET, Role.RETAIN))
        return get_fila_state_dict(self.model, *data, show_progress_bar=False)

    def trainer(self, callbacks: Sequence[TrainerCallback] = ()) -> UnlearningTrainer:
        args = UnlearnConfig(
            self.output.name,
            num_train_epochs=EPOCHS,
            per_device_train_batch_size=self.batch_size,
            learning_rate=LEARNING_RATE,
            weight_decay=WEIGHT_DECAY,
            data_seed=0,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        data = {"forget_dataset": self.forget, "retain_dataset": self.retain}
        return UnlearningTrainer(self.model, args, **data, callbacks=list(callbacks))


def adapted(base: nn.Module) -> PeftModel:
    config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(copy.deepcopy(base), config).train()


def moved(batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {name: tensor.to(device) for name, tensor in batch.items()}


def batches_of(examples: Sequence[Example]) -> list[dict[str, Tensor]]:
    collate = LanguageModelCollator(0)
    return [collate([examples[i] for i in batch]) for batch in token_budget_batches(examples, IMPORTANCE_TOKENS)]


class Authors:
    """Pieces of the authors' recipe on the same problem."""

    def __init__(self, problem: Problem, length: int) -> None:
        self.problem = problem
        pairs = [problem.pairs[i] for i in range(problem.batch_size)]
        self.batches = [
            moved(tofu.padded([pair[role] for pair in pairs], length), problem.device)
            for role in (Role.FORGET, Role.RETAIN)
        ]
        self.allow_gradients()
        self.fisher = self.importance()
        self.model = adapted(problem.base)
        authors.initialise(self.model, *self.fisher)
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, LEARNING_RATE, weight_decay=WEIGHT_DECAY)

    def allow_gradients(self) -> None:
        self.problem.base.requires_grad_()

    def importance(self) -> list[dict[str, Tensor]]:
        """Of one micro-batch of each set."""
        p = self.problem
        return [authors.importance_of(p.targets, p.base, [batch]) for batch in self.batches]

    def factors(self) -> None:
        authors.initialise(self.problem.model, *self.fisher)

    def step(self) -> None:
        authors.training_step(self.model, self.optimizer, *self.batches)


def check_losses(p: Problem, theirs: Authors) -> None:
    """A batch has the same loss, and the adapter the same gradients, both ways."""
    p.renew()
    initialize_lora_fila_weights(p.model, p.importance(), show_progress_bar=False)
    trainer = p.trainer()
    batch = moved(trainer.data_collator([p.pairs[i] for i in range(p.batch_size)]), p.device)
    losses = trainer.compute_loss(p.model, batch), authors.loss(p.model, *theirs.batches)
    trained = [parameter for parameter in p.model.parameters() if parameter.requires_grad]
    ours, expected = (torch.cat([g.flatten() for g in torch.autograd.grad(loss, trained)]).float() for loss in losses)
    tolerance = 1e-5 if p.base.dtype == torch.float32 else 0.02
    assert (losses[0] - losses[1]).abs() < tolerance * losses[1].abs()
    assert (ours - expected).norm() < 100 * tolerance * expected.norm()


class Clock:
    """Milliseconds by name; those of a call inside another's are not counted twice."""

    def __init__(self, device: torch.device) -> None:
        self.milliseconds: dict[str, float] = {}
        self._device, self._within = device, [0.0]

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        started = self._now()
        self._within.append(0.0)
        yield
        spent = self._now() - started
        self.milliseconds[name] = self.milliseconds.get(name, 0.0) + spent - self._within.pop()
        self._within[-1] += spent

    def of(self, name: str, function: Callable) -> Callable:
        """The function, with its calls timed."""

        @functools.wraps(function)
        def timed(*arguments: Any, **options: Any) -> Any:
            with self(name):
                return function(*arguments, **options)

        return timed

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() * 1e3


class ClockOptimizer(TrainerCallback):
    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        self.step = self.clock("training: optimizer")
        self.step.__enter__()

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        self.step.__exit__(None, None, None)


def parts(p: Problem) -> dict[str, float]:
    """Milliseconds of the parts of ours."""
    clock = Clock(p.device)
    p.renew()
    with clock("importance: both sets"):
        state = p.importance()
    with clock("factors: weighted SVD, residual"):
        initialize_lora_fila_weights(p.model, state, show_progress_bar=False)
    with clock("training: set-up, looking at the model"):
        trainer = p.trainer([ClockOptimizer(clock)])
    for method, name in {
        "get_batch_samples": "training: data",
        "scorer": "training: body, forward",
        "compute_loss": "training: head, losses and their gradients",
        "training_step": "training: body, backward",
        "train": "training: trainer's own",
    }.items():
        setattr(trainer, method, clock.of(name, getattr(trainer, method)))
    trainer.train()
    return clock.milliseconds


def test_unlearning(bench):
    p = Problem(bench.quick, bench.device)
    theirs = Authors(p, length=100 if bench.quick else authors.LENGTH)
    check_losses(p, theirs)
    count, steps = len(p.pairs), EPOCHS * p.batches
    workload = f"LoKU, {p.shape}, {count} + {count} sequences ({p.source}), {EPOCHS} epochs"
    bench.rounds = min(bench.rounds, 3)
    pieces = {
        f"authors': importance, 1 of {p.batches} micro-batches": (p.batches, theirs.importance, theirs.allow_gradients),
        "authors': factors": (1, theirs.factors, p.renew),
        f"authors': 1 of {steps} training steps": (steps, theirs.step, theirs.allow_gradients),
    }
    ours = Candidate("importance, factors, UnlearningTrainer", "ours", p.ours, prepare=p.renew)
    measured = [Candidate(name, "peer", run, 2, prepare=prepare) for name, (_, run, prepare) in pieces.items()]
    found = bench.measure(workload, [ours, *measured], work=p.flops, unit="GFLOP/s")

    label, work = found[ours.name].workload, found[ours.name].work
    for name in pieces:
        found[name].work = 0  # they are not the whole of it
    whole = Measurement(label, f"authors': all, {p.batches} x, 1 x and {steps} x these", "peer", work, "GFLOP/s")
    whole.times_ms = [sum(times * found[name].median_ms for name, (times, _, _) in pieces.items())]
    whole.peak_mib = max(found[name].peak_mib for name in pieces)
    bench.report.measurements.append(whole)
    for name, milliseconds in parts(p).items():
        part = Measurement(label, name, "part", 0, "GFLOP/s", [milliseconds], allocator=bench.allocator)
        bench.report.measurements.append(part)
    bench.target(workload, "authors' / ours", whole.median_ms / found[ours.name].median_ms, 10.0, at_least=True)
