"""FisherAccumulator leaves models alone, keeps to memory budgets, resumes, and is exact on long data; or says so."""

from __future__ import annotations

import pytest
import torch
from fisher_oracle import TwoLayers, accumulate, assert_close, assert_equal, finite, matrices_alive, padded, sequences
from safetensors.torch import load_file, save_file
from small_models import build
from torch import nn

from loku_kernels import FisherAccumulator

pytestmark = pytest.mark.usefixtures("one_thread")

BATCHES = padded(sequences(0, 6), 2)
TARGETS = ["q_proj", "up_proj", "down_proj"]  # 4 KiB, 6 KiB and 6 KiB in float32, in each of two blocks


# --- what is left behind


def test_the_model_is_left_as_it_was():
    model = build("llama")
    model.model.embed_tokens.requires_grad_(False)
    model.model.layers[0].mlp.requires_grad_(False)
    model.model.norm.weight.grad = torch.ones(32)
    required, values = _requirements(model), [p.clone() for p in model.parameters()]
    with FisherAccumulator(model, TARGETS) as accumulator:
        assert not any(_requirements(model))
        accumulator.update(BATCHES[0])
        assert not model.training
        model(BATCHES[0]["input_ids"])  # without the accumulator's blocks, a forward pass is just that
    assert _requirements(model) == required
    assert [p.grad is None for p in model.parameters()].count(False) == 1
    assert torch.equal(model.model.norm.weight.grad, torch.ones(32))
    assert all(torch.equal(p, value) for p, value in zip(model.parameters(), values, strict=True))
    assert not any(module._forward_hooks for module in model.modules())


def test_the_model_is_left_as_it_was_after_an_error():
    model = build("llama")
    required = _requirements(model)
    with pytest.raises(KeyError, match="mine"), FisherAccumulator(model, TARGETS) as accumulator:
        accumulator.update(BATCHES[0])
        raise KeyError("mine")
    assert _requirements(model) == required and not any(module._forward_hooks for module in model.modules())


def _requirements(model: nn.Module) -> list[bool]:
    return [parameter.requires_grad for parameter in model.parameters()]


def test_two_accumulators_on_one_model_do_not_mix():
    model = build("gpt_neo")
    with FisherAccumulator(model) as first, FisherAccumulator(model, granularity="token") as second:
        for batch in BATCHES:
            first.update(batch)
        second.update(BATCHES[0])
    assert_equal(first.fisher, accumulate(model, BATCHES))
    assert_equal(second.fisher, accumulate(model, BATCHES[:1], granularity="token"))


# --- memory budget


@pytest.mark.parametrize("kib,accumulators,passes", [(32, 1, 1), (20, 1, 2), (12, 1, 3), (12, 2, 6), (64, 2, 1)])
def test_groups_of_layers_under_a_memory_budget(kib, accumulators, passes, monkeypatch):
    """As many passes as were said beforehand, never more memory than that, and the same result."""
    model = build("llama")
    expected = accumulate(model, BATCHES, target_modules=TARGETS)
    alive = matrices_alive(monkeypatch)
    accumulator = FisherAccumulator(model, TARGETS, memory_budget=1024 * kib, accumulators=accumulators)
    assert accumulator.passes == passes
    found = {}
    with accumulator:
        for names in accumulator.groups():
            for batch in BATCHES:
                accumulator.update(batch)
            fisher = accumulator.fisher
            assert list(fisher) == names
            found |= {name: f.clone() for name, f in fisher.items()}
            del fisher
    assert_equal(found, expected)
    assert max(alive) <= 1024 * kib // accumulators


def test_a_budget_that_is_too_small_and_a_loop_that_is_missing():
    model = build("llama")
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.up_proj alone needs 12288 bytes and the budget is 10240"):
        FisherAccumulator(model, TARGETS, memory_budget=10 * 1024)
    with FisherAccumulator(model, TARGETS, memory_budget=12 * 1024) as accumulator:
        for use in (lambda: accumulator.update(BATCHES[0]), lambda: accumulator.fisher, accumulator.state_dict):
            with pytest.raises(RuntimeError, match=r"memory_budget makes this 6 passes: iterate over `groups\(\)`"):
                use()


# --- interruption


@pytest.mark.parametrize("granularity", ["sequence", "token", "batch"])
def test_it_resumes_where_it_stopped(tmp_path, granularity):
    model = build("gpt2")
    expected = accumulate(model, BATCHES, granularity=granularity)
    with FisherAccumulator(model, granularity=granularity) as accumulator:
        accumulator.update(BATCHES[0])
        save_file(accumulator.state_dict(), tmp_path / "state.safetensors")
    with FisherAccumulator(model, granularity=granularity) as accumulator:
        accumulator.update(BATCHES[2])  # forgotten when the state is loaded
        accumulator.load_state_dict(load_file(tmp_path / "state.safetensors"))
        for batch in BATCHES[1:]:
            accumulator.update(batch)
    assert_equal(accumulator.fisher, expected)


def test_it_resumes_in_the_middle_of_the_passes():
    model = build("llama")
    expected = accumulate(model, BATCHES, target_modules=TARGETS)
    options = {"target_modules": TARGETS, "memory_budget": 12 * 1024, "accumulators": 1}
    with FisherAccumulator(model, **options) as accumulator:
        for number, _ in enumerate(accumulator.groups()):
            accumulator.update(BATCHES[0])
            if number == 1:
                state = {name: value.clone() for name, value in accumulator.state_dict().items()}
                break
    found, batches = {}, BATCHES[1:]
    with FisherAccumulator(model, **options) as accumulator:
        accumulator.load_state_dict(state)
        for _ in accumulator.groups():
            for batch in batches:
                accumulator.update(batch)
            found |= accumulator.fisher
            batches = BATCHES
    assert list(found) == list(expected)[2:]
    assert_equal(found, {name: expected[name] for name in found})


@pytest.mark.parametrize("reload", [False, True])
def test_looking_at_the_result_does_not_change_it(reload):
    """Also where a state of before is the very tensors that `fisher` brings to another scale."""
    model = build("llama")
    expected = accumulate(model, BATCHES)
    with FisherAccumulator(model) as accumulator:
        state = accumulator.state_dict()
        for number, batch in enumerate(BATCHES):
            accumulator.update(batch)
            part = {name: fisher.clone() for name, fisher in accumulator.fisher.items()}
            assert_close(part, accumulate(model, BATCHES[: number + 1]), 1e-6)
            if reload:
                accumulator.load_state_dict(state)
                state = accumulator.state_dict()
    assert_close(accumulator.fisher, expected, 1e-6)


def test_states_of_something_else_are_refused():
    model = build("llama")
    state = FisherAccumulator(model, TARGETS).state_dict()
    for other, change, message in [
        (FisherAccumulator(model, ["q_proj"]), {}, r"not those of any pass here"),
        (FisherAccumulator(model, TARGETS, "token"), {}, "accumulated by sequence, but granularity is 'token'"),
        (FisherAccumulator(model, TARGETS), {"granularity": torch.tensor(7)}, "accumulated by something unknown"),
        (
            FisherAccumulator(model, TARGETS),
            {"fisher.model.layers.1.mlp.up_proj": torch.zeros(32, 48)},
            r"shape \(32, 48\) for model\.layers\.1\.mlp\.up_proj, whose weight has \(48, 32\)",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            other.load_state_dict(state | change)
    with pytest.raises(
        ValueError, match="must be a FisherAccumulator's state_dict, but lacks granularity, label_tokens"
    ):
        FisherAccumulator(model, TARGETS).load_state_dict({"unit": state["unit"]})


# --- long data


def test_no_bias_builds_up_over_ten_thousand_sequences():
    """In bfloat16, F keeps a relative error below 2e-5 in every entry, and below 3e-6 on average, which float32 sums
    have of themselves: squares below half of a sum's last digit are lost. (A sum in bfloat16 stops growing.)"""
    model = TwoLayers(torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    total = torch.zeros(16, 24, dtype=torch.float64)
    with FisherAccumulator(model, ["good"]) as accumulator:
        for _ in range(20):
            lengths = torch.randint(1, 6, (500,), generator=generator)
            inputs = torch.randn(int(lengths.sum()), 24, generator=generator).bfloat16()
            grads = torch.randn(int(lengths.sum()), 16, generator=generator).bfloat16()
            outer = grads.double()[:, :, None] * inputs.double()[:, None]
            sequence = torch.arange(500).repeat_interleave(lengths)
            gradients = torch.zeros(500, 16, 24, dtype=torch.float64).index_add_(0, sequence, outer)
            total += (gradients**2 / lengths[:, None, None]).sum(0)
            offsets = [0, *lengths.cumsum(0).tolist()]
            with accumulator.sequences(offsets, lengths):
                model.backward(inputs[None], grads[None], torch.zeros(1, 1, 24).bfloat16(), torch.zeros(()).bfloat16())
        label_tokens = float(accumulator.state_dict()["label_tokens"])
    error = accumulator.fisher["good"].double() / (total / label_tokens) - 1
    assert float(error.abs().max()) < 2e-5
    assert abs(float(error.mean())) < 3e-6


# --- gradients that are not finite


@pytest.mark.parametrize("granularity", ["sequence", "token", "batch"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["inputs", "gradients"])
def test_gradients_that_are_not_finite_are_reported_by_module(granularity, value, where):
    """At once; and the sums, which they are in, are given out no more until a good state is loaded."""
    model, (inputs, grads), (bad_inputs, bad_grads) = TwoLayers(), finite(), finite()
    (bad_inputs if where == "inputs" else bad_grads)[0, 3, 7] = value
    with FisherAccumulator(model, granularity=granularity) as accumulator:
        with accumulator.sequences([0, 2, 6], [2, 4]):
            model.backward(inputs, grads, inputs, grads)
        state = {name: tensor.clone() for name, tensor in accumulator.state_dict().items()}
        expected = {name: tensor.clone() for name, tensor in accumulator.fisher.items()}
        with (
            pytest.raises(FloatingPointError, match=r"NaN or infinite squared gradients in bad$"),
            accumulator.sequences([0, 2, 6], [2, 4]),
        ):
            model.backward(inputs, grads, bad_inputs, bad_grads)
        for use in (lambda: accumulator.fisher, accumulator.state_dict, accumulator.sequences([0, 6], [6]).__enter__):
            with pytest.raises(RuntimeError, match="the sums are spoilt: NaN or infinite squared gradients in bad"):
                use()
        accumulator.load_state_dict(state)
        assert_close(accumulator.fisher, expected, 1e-6)


def test_squares_that_overflow_are_reported_by_module():
    model, (inputs, grads) = TwoLayers(), finite()
    large = [torch.zeros_like(inputs), torch.zeros_like(grads)]
    large[0][0, 3, 7] = large[1][0, 3, 5] = 1e15
    with FisherAccumulator(model) as accumulator:
        with accumulator.sequences([0, 6], [6]):
            model.backward(inputs, grads, *large)
        with pytest.raises(FloatingPointError, match=r"NaN or infinite squared gradients in bad$"):
            _ = accumulator.fisher


def test_a_model_that_gives_nan():
    model = build("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.gate_proj.weight[3, 4] = float("nan")
    with (
        FisherAccumulator(model, TARGETS) as accumulator,
        pytest.raises(FloatingPointError, match=r"model\.layers\.1\.mlp\.down_proj"),
    ):
        accumulator.update(BATCHES[0])
