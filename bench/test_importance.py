"""The importance pass of a whole model over TOFU's sequences: beside a training step on the same packed tokens, and
beside the authors' formulation, which pads each sequence to 500 tokens.

Of the authors' formulation one batch is timed, and the target compares times per sequence. Lengths, prompts and answers
are those of TOFU's forget10 where the data are at hand (LOKU_DATA, or ../shared/data); else lengths are drawn with the
mean and spread of those. Weights are random.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from bench import authors, tofu
from bench.harness import Candidate
from loku.data import IGNORE_INDEX, LanguageModelCollator
from loku_kernels import FisherAccumulator
from loku_kernels.fisher_accumulator import sum_of_token_losses

ROW_TOKENS = 512  # of a packed row
AUTHORS_BATCH = 16


class Problem:
    """The model and the same sequences packed, and a batch of them padded as the authors do."""

    def __init__(self, quick: bool, device: torch.device) -> None:
        self.source, self.examples = tofu.examples("forget10", 8 if quick else 2 * AUTHORS_BATCH)
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        layers, size = (2, 64) if quick else (12, 768)
        self.model = tofu.gpt_neo(layers, size).to(device, dtype)
        self.device = device
        linear = {name: m for name, m in self.model.named_modules() if isinstance(m, nn.Linear) and name != "lm_head"}
        self.names, self.targets = list(linear), list(linear.values())
        self.packed = self._moved(LanguageModelCollator(0, row_tokens=ROW_TOKENS)(self.examples))
        self.tokens = self.packed["input_ids"].numel()
        self.authors_sequences = len(self.examples) // 2
        self.length = 200 if quick else authors.LENGTH
        self.authors_batch = self._moved(tofu.padded(self.examples[: self.authors_sequences], self.length))

    def _moved(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor.to(self.device) for name, tensor in batch.items()}

    @property
    def flops(self) -> int:
        """Matrix products of weights: all of them forward, their inputs' gradients, and those of the targets."""
        targets = sum(module.weight.numel() for module in self.targets)
        return 2 * self.tokens * (3 * targets + 2 * self.model.lm_head.weight.numel())

    def importance(self) -> dict[str, Tensor]:
        with FisherAccumulator(self.model) as accumulator:
            accumulator.update(self.packed)
        return accumulator.fisher

    def training_step(self) -> None:
        inputs = {"use_cache": False, **self.packed}
        targets = nn.functional.pad(inputs.pop("labels")[:, 1:], (0, 1), value=IGNORE_INDEX)
        (sum_of_token_losses(self.model, inputs, targets) / self.tokens).backward()

    def authors(self) -> dict[str, Tensor]:
        return authors.importance_of(self.names, self.model, [self.authors_batch])

    def require(self, targets_only: bool) -> Callable[[], None]:
        """Which weights the next step is to give gradients to; those of the last are dropped."""

        def prepare() -> None:
            self.model.zero_grad(set_to_none=True)
            self.model.requires_grad_(not targets_only)
            for module in self.targets:
                module.weight.requires_grad_()

        return prepare

    def check(self, fisher: dict[str, Tensor]) -> None:
        """The last layer's F against .grad of every sequence by itself."""
        name = next(reversed(fisher))
        weight = self.model.get_submodule(name).weight
        self.require(targets_only=False)()
        total, labels = torch.zeros_like(weight, dtype=torch.float32, requires_grad=False), 0
        for example in self.examples:
            batch = self._moved({key: torch.tensor([value]) for key, value in example.items()})
            n = sum(label != IGNORE_INDEX for label in example["labels"])
            (gradient,) = torch.autograd.grad(self.model(**batch, use_cache=False).loss, weight)
            total.addcmul_(gradient.float(), gradient.float(), value=n)
            labels += n
        tolerance = 1e-3 if weight.dtype == torch.float32 else 0.1
        assert (fisher[name] - total / labels).norm() < tolerance * (total / labels).norm()


def test_importance(bench):
    p = Problem(bench.quick, bench.device)
    count, every = len(p.examples), p.require(targets_only=False)
    shape = "small GPT-Neo" if bench.quick else "GPT-Neo 125M"
    workload = f"importance, {shape}, {count} sequences ({p.source}), {p.tokens} tokens"
    ours, all_weights, targets = "FisherAccumulator", "training step, all weights", "training step, target weights only"
    theirs = f"authors': {p.authors_sequences} of the {count} sequences, padded to {p.length}"
    found = bench.measure(
        workload,
        [
            Candidate(ours, "ours", p.importance, check=p.check, prepare=every),
            Candidate(all_weights, "limit", p.training_step, prepare=every),
            Candidate(targets, "limit", p.training_step, prepare=p.require(targets_only=True)),
            Candidate(theirs, "peer", p.authors, every=3, prepare=every),
        ],
        work=p.flops,
        unit="GFLOP/s",
    )
    times = {name: m.median_ms for name, m in found.items()}
    bench.target(workload, f"ours / {all_weights}", times[ours] / times[all_weights], 1.25)
    bench.target(workload, f"ours / {targets}", times[ours] / times[targets], 1.25)
    ratio = times[theirs] / p.authors_sequences / (times[ours] / count)
    bench.target(workload, "authors' / ours, per sequence", ratio, 8.0, at_least=True)
