"""One step of LoKU's training, IHL on forget and CE on retain sequences, beside the authors' formulation of the same.

Both train rank 16 on all linear layers but the head by AdamW. On a GPU a step has 32 forget and 32 retain sequences of
TOFU's lengths, the authors' batch: ours in packed rows at once, the authors' padded to 500 tokens each and accumulated
over batches of 8 + 8, as many as fit. On a CPU it has 8 and 8. Weights are random. FILA would change what the adapter
starts from, not what a step computes. Rates are in tokens without padding. Rows of the role "part" say where the GPU's
time goes in a step of ours.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from transformers import GPTNeoConfig, PhiConfig

from bench import authors, tofu
from bench.harness import Candidate, Measurement, forward_backward
from bench.test_llama import LLAMA2_7B, give_back_memory, random_model, sequences
from bench.test_unlearning import LEARNING_RATE, WEIGHT_DECAY, adapted, moved
from loku.data import Role
from loku.training import UnlearnConfig, UnlearningTrainer
from loku.training.methods import Totals

PAIRS, PAIRS_ON_CPU = 32, 8  # of a step
AT_ONCE = 8  # of them, the authors'
KERNELS = ("row_losses_and_gradient_kernel", "row_losses_kernel", "row_gradient_kernel")


def gpt_neo(layers: int, size: int, heads: int) -> GPTNeoConfig:
    attention = [[["global", "local"], layers // 2]]
    return GPTNeoConfig(num_layers=layers, hidden_size=size, num_heads=heads, attention_types=attention)


MODELS = {
    "GPT-Neo 2 x 64": gpt_neo(2, 64, 1),
    "GPT-Neo 125M": gpt_neo(12, 768, 12),
    "GPT-Neo 1.3B": gpt_neo(24, 2048, 16),
    "GPT-Neo 2.7B": gpt_neo(32, 2560, 20),
    "Phi-1.5": PhiConfig(),  # its defaults
    "Llama2-7B": LLAMA2_7B,
}
QUICK_SHAPES, SHAPES = [("GPT-Neo 2 x 64",)], [(name,) for name in MODELS if name != "GPT-Neo 2 x 64"]
ON_CPU = "GPT-Neo 125M"


class Problem:
    """A model with an adapter and its optimizer, and the batch of a step both ways."""

    def __init__(self, name: str, length: int, device: torch.device, output: Path) -> None:
        config = MODELS[name]
        self.count = PAIRS if device.type == "cuda" else PAIRS_ON_CPU
        self.model = adapted(random_model(config, device))
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, LEARNING_RATE, weight_decay=WEIGHT_DECAY)
        self.source, forget = sequences("forget05", self.count, config.vocab_size)
        _, retain = sequences("retain95", 10 * self.count, config.vocab_size)
        args = UnlearnConfig(str(output), method="ihl", per_device_train_batch_size=self.count, report_to="none")
        self.trainer = UnlearningTrainer(self.model, args, forget_dataset=forget, retain_dataset=retain)
        pairs = [self.trainer.train_dataset[i] for i in range(self.count)]
        self.tokens = sum(len(example["input_ids"]) for pair in pairs for example in pair.values())
        self.batch = moved(self.trainer.data_collator(pairs), device)
        self.part = moved(self.trainer.data_collator(pairs[:AT_ONCE]), device)
        roles = (Role.FORGET, Role.RETAIN)
        self.padded = [
            [moved(tofu.padded([pair[role] for pair in part], length), device) for role in roles]
            for part in (pairs[i : i + AT_ONCE] for i in range(0, self.count, AT_ONCE))
        ]

    def loss(self) -> torch.Tensor:
        return self.trainer.compute_loss(self.model, self.batch)

    def step(self) -> None:
        self.loss().backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def authors_step(self) -> None:
        for forget, retain in self.padded[1:]:
            (authors.loss(self.model, forget, retain) / len(self.padded)).backward()
        authors.training_step(self.model, self.optimizer, *self.padded[0])

    def check(self) -> None:
        """A part's loss is the same, and so are the adapter's gradients, both ways."""
        losses = (
            lambda: self.trainer.compute_loss(self.model, self.part),
            lambda: authors.loss(self.model, *self.padded[0]),
        )
        (ours, gradients), (theirs, expected) = (forward_backward(loss, *self.trained)() for loss in losses)
        differences = [mine - other for mine, other in zip(gradients, expected, strict=True)]
        distance, size = (nn.utils.get_total_norm(tensors) for tensors in (differences, expected))
        in_float32 = self.model.dtype == torch.float32
        assert (ours - theirs).abs() < (1e-5 if in_float32 else 0.02) * theirs.abs()
        assert distance < (1e-3 if in_float32 else 0.5) * size  # GPT-Neo's attention is not scaled: 0.4 in 32 layers

    def parts(self) -> dict[str, float]:
        """Milliseconds of the GPU in a step, in its head, and in our kernels."""
        step, scores = kernel_times(self.step), self.trainer.scorer(self.model, self.batch)
        head = kernel_times(lambda: self.trainer.method.loss(scores, None, Totals.of(self.batch)))
        ours = {f"  {kernel}": sum(step[name] for name in step if kernel in name) for kernel in KERNELS}
        return {"all kernels": step.total(), "head: products, losses and their gradients": head.total(), **ours}


def kernel_times(run: Callable[[], object]) -> Counter[str]:
    """Milliseconds of each kernel of a call, with copies and fills."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    times: Counter[str] = Counter()
    for event in profiler.events():
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation:
            times[event.name] += event.time_range.elapsed_us() / 1e3
    return times


@pytest.fixture(autouse=True)
def one_model_at_a_time() -> Iterator[None]:
    yield
    give_back_memory()


def test_training_step(bench, shape: tuple[str], tmp_path: Path):
    (name,) = shape
    if bench.device.type == "cpu" and not bench.quick and name != ON_CPU:
        pytest.skip(f"on a CPU only {ON_CPU}: others take a GPU")
    length = 100 if bench.quick else authors.LENGTH
    p = Problem(name, length, bench.device, tmp_path)
    p.check()
    workload = f"LoKU's step, {name}, {p.count} + {p.count} sequences ({p.source}), {p.tokens} tokens"
    rows, width = p.batch["input_ids"].shape
    ours, theirs = f"UnlearningTrainer, {rows} rows of {width}", f"authors': {2 * p.count} rows of {length}"
    bench.rounds = min(bench.rounds, 5 if bench.device.type == "cuda" else 2)
    found = bench.measure(
        workload,
        [Candidate(ours, "ours", p.step), Candidate(theirs, "peer", p.authors_step, every=2)],
        work=1e9 * p.tokens,  # the tables' rates are in billions a second
        unit="tokens/s",
    )
    for part, milliseconds in (p.parts() if bench.device.type == "cuda" else {}).items():
        if milliseconds > 0:
            label, allocator = found[ours].workload, bench.allocator
            part = Measurement(label, part, "part", 0, "tokens/s", [milliseconds], allocator=allocator)
            bench.report.measurements.append(part)
    bench.target(workload, "authors' / ours", found[theirs].median_ms / found[ours].median_ms, 5.0, at_least=True)
