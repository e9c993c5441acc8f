"""FILA on a model of Llama2-7B's shape: the importance pass over TOFU's sequences, and the factors of all 224 matrices.

Each runs once, by the wall clock, after a batch of each set and a matrix of each shape have been gone through untimed.
Sequences are TOFU's where the data are at hand, else drawn with such lengths; their tokens are GPT-2's, modulo Llama's
vocabulary. Weights are random, which for the weighted SVD is the hardest spectrum: a flat one.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, PreTrainedModel

from bench import test_weighted_svd, tofu
from bench.harness import Measurement
from bench.test_unlearning import Clock
from loku.cli.data import importance_batches
from loku.data import IGNORE_INDEX, Example
from loku.fila import get_fila_state_dict, initialize_lora_fila_weights
from loku.fila.targets import base_weight, lora_layers
from loku.measuring import MIB, peak_memory
from loku_kernels.svd import weighted_svd

LLAMA2_7B = LlamaConfig(max_position_embeddings=4096)  # what else there is has the right defaults
QUICK = LlamaConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2, vocab_size=512)
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANK = 32
BATCH_TOKENS = 2048  # of the importance pass, as `loku importance` has it
EXCESS = 1e-3


class Problem:
    """The model with a new adapter, and the batches of both sets."""

    def __init__(self, quick: bool, device: torch.device) -> None:
        config, self.count = (QUICK, 8) if quick else (LLAMA2_7B, 400)
        self.shape = f"Llama {config.num_hidden_layers} x {config.hidden_size}" if quick else "Llama2-7B"
        lora = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=TARGETS, task_type="CAUSAL_LM")
        self.model = get_peft_model(random_model(config, device), lora)
        self.source, self.forget = sequences("forget10", self.count, config.vocab_size)
        _, self.retain = sequences("retain90", self.count, config.vocab_size)
        self.batches = importance_batches(self.forget, self.retain, None, BATCH_TOKENS, seed=0)
        self.state = get_fila_state_dict(self.model, *(b[:1] for b in self.batches), show_progress_bar=False)

    @property
    def weights(self) -> dict[str, Tensor]:
        return {name: base_weight(layer) for name, layer in lora_layers(self.model, "default").items()}

    @property
    def tokens(self) -> int:
        return sum(len(example["input_ids"]) for example in self.forget + self.retain)

    @property
    def flops(self) -> int:
        """Of the importance pass: tokens without padding, the head for scored ones only."""
        scored = sum(label >= 0 for example in self.forget + self.retain for label in example["labels"])
        body = sum(weight.numel() for weight in self.weights.values())
        return 2 * (3 * self.tokens * body + 2 * scored * self.model.get_output_embeddings().weight.numel())

    def importance(self) -> None:
        self.state = get_fila_state_dict(self.model, *self.batches, show_progress_bar=False)

    def factors(self) -> None:
        initialize_lora_fila_weights(self.model, self.state, show_progress_bar=False)

    def excess(self) -> dict[str, float]:
        """Of one matrix of each shape: by what the weighted SVD's residual exceeds the optimum, relative to it."""
        last = {f"{len(weight)} x {len(weight.T)}": (name, weight) for name, weight in self.weights.items()}
        return {shape: excess(weight, self.state[name]) for shape, (name, weight) in last.items()}


def excess(weight: Tensor, row_weight: Tensor) -> float:
    """The optimum is from the eigenvalues of the Gram matrix, in float64: a GPU finds those far sooner."""
    scaled = row_weight[:, None] * weight.float()
    short = (scaled if len(scaled) <= scaled.shape[1] else scaled.T).double()
    values = torch.linalg.eigvalsh(short @ short.T).flip(0).clamp(min=0).sqrt()
    return test_weighted_svd.excess(scaled, values, RANK, weighted_svd(weight, row_weight, RANK))["excess"]


def random_model(config: PreTrainedConfig, device: torch.device) -> PreTrainedModel:
    """Made on the device, where billions of random weights take no time."""
    torch.manual_seed(0)
    with device:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def sequences(split: str, count: int, vocabulary: int) -> tuple[str, list[Example]]:
    """Those of `tofu.examples`, with tokens modulo the vocabulary: lengths are what matters."""
    source, examples = tofu.examples(split, count)
    within = [{key: [_within(token, vocabulary) for token in tokens] for key, tokens in e.items()} for e in examples]
    return source, within


def _within(token: int, vocabulary: int) -> int:
    return token if token == IGNORE_INDEX else token % vocabulary


def give_back_memory() -> None:
    """What a model held, once nothing but cycles refers to it."""
    gc.collect()
    torch.cuda.empty_cache()


def run_once(bench, workload: str, name: str, run: Callable[[], None], *, work: float, unit: str) -> float:
    """Seconds by the wall clock; kept for the tables, with the peak memory of the same run."""
    clock = Clock(bench.device)
    peak = bench.benchmark.pedantic(peak_memory, (clock.of(name, run), bench.device))
    times, allocator = [clock.milliseconds[name]], bench.allocator
    bench.report.measurements.append(Measurement(workload, name, "ours", work, unit, times, peak / MIB, allocator))
    return times[0] / 1e3


@pytest.fixture(scope="module")
def llama(request: pytest.FixtureRequest) -> Iterator[Problem]:
    quick = request.config.getoption("quick")
    if not (quick or torch.cuda.is_available()):
        pytest.skip("a model of 7 billion weights needs a GPU; --quick has a small one")
    problem = Problem(quick, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    yield problem
    vars(problem).clear()
    give_back_memory()


def test_importance_pass(bench, llama: Problem):
    workload = f"importance, {llama.shape}, 2 x {llama.count} sequences ({llama.source}), {llama.tokens} tokens"
    batches = f"{sum(map(len, llama.batches))} batches of up to {BATCH_TOKENS} tokens"
    seconds = run_once(bench, workload, batches, llama.importance, work=llama.flops, unit="GFLOP/s")
    bench.target(workload, "seconds", seconds, 60.0)


def test_factors(bench, llama: Problem):
    found = llama.excess()
    workload = f"FILA's factors, {llama.shape}, {len(llama.weights)} matrices, rank {RANK}"
    work = 1e9 * len(llama.weights)  # the tables' rates are in billions a second
    seconds = run_once(bench, workload, "initialize_lora_fila_weights", llama.factors, work=work, unit="matrix/s")
    bench.target(workload, "seconds", seconds, 10.0)
    for shape, value in found.items():
        bench.target(f"weighted SVD, {shape}, rank {RANK}", "residual above the optimum's, relative", value, EXCESS)
    assert max(found.values()) <= EXCESS
