"""FisherAccumulator used wrongly, or with batches and layers that it cannot serve: refused by name, at once."""

from __future__ import annotations

import types

import pytest
import torch
from fisher_oracle import TwoLayers, accumulate, assert_close, assert_equal, finite, padded, sequences
from small_models import build
from torch import Tensor, nn

from loku_kernels import FisherAccumulator
from loku_kernels.fisher_accumulator import sum_of_token_losses

pytestmark = pytest.mark.usefixtures("one_thread")

BATCHES = padded(sequences(0, 6), 2)
TARGETS = ["q_proj", "up_proj", "down_proj"]


# --- blocks that are used wrongly


def test_use_outside_of_the_with_block():
    model = build("llama")
    accumulator = FisherAccumulator(model, TARGETS)
    with pytest.raises(RuntimeError, match="must be entered first"):
        accumulator.update(BATCHES[0])
    with accumulator:
        accumulator.update(BATCHES[0])
        with pytest.raises(RuntimeError, match="entered already"), accumulator:
            pass
        accumulator.update(BATCHES[1])
    with pytest.raises(RuntimeError, match="must be entered first"):
        accumulator.update(BATCHES[0])
    with accumulator:
        accumulator.update(BATCHES[2])
    assert_equal(accumulator.fisher, accumulate(model, BATCHES, target_modules=TARGETS))


def test_backward_or_forward_outside_of_the_block():
    """Nothing is added, and the accumulator goes on."""
    model = build("llama")
    expected = accumulate(model, BATCHES[:1], target_modules=TARGETS)
    labels = BATCHES[0]["labels"]
    block = {"offsets": [0, labels.shape[1], labels.numel()], "label_counts": [3, 3]}
    with FisherAccumulator(model, TARGETS) as accumulator:
        with (
            pytest.raises(RuntimeError, match=r"no gradient reached .*q_proj.*inside the `sequences` block"),
            accumulator.sequences(**block),
        ):
            loss = model(**BATCHES[0]).loss
        with pytest.raises(RuntimeError, match="outside of the `sequences` block of its forward pass"):
            loss.backward()
        with accumulator.sequences(block["offsets"], [0, 0]):
            loss = model(**BATCHES[0]).loss
        with (
            pytest.raises(RuntimeError, match="outside of the `sequences` block of its forward pass"),
            accumulator.sequences(**block),
        ):
            loss.backward()
        with (
            pytest.raises(RuntimeError, match="`sequences` was entered inside `sequences`"),
            accumulator.sequences(**block),
            accumulator.sequences(**block),
        ):
            pass
        accumulator.update(BATCHES[0])
    assert_equal(accumulator.fisher, expected)


def test_two_passes_in_one_block():
    model, data = TwoLayers(), finite()
    with FisherAccumulator(model) as accumulator:
        with (
            pytest.raises(RuntimeError, match="is for one forward and one backward pass"),
            accumulator.sequences([0, 6], [6]),
        ):
            model.backward(*data, *data)
            model.backward(*data, *data)
        with pytest.raises(RuntimeError, match="the sums are spoilt: a batch was broken off when part of it had been"):
            _ = accumulator.fisher


def test_a_batch_that_fails_before_its_backward_pass_is_as_if_it_had_not_been():
    model = build("llama")
    expected = accumulate(model, BATCHES, target_modules=TARGETS)
    fail = [False, True, False, False]

    def loss(*arguments):
        total = sum_of_token_losses(*arguments)
        if fail.pop(0):
            raise MemoryError
        return total

    with FisherAccumulator(model, TARGETS, loss=loss) as accumulator:
        accumulator.update(BATCHES[0])
        with pytest.raises(MemoryError):
            accumulator.update(BATCHES[1])
        for batch in BATCHES[1:]:
            accumulator.update(batch)
    assert_equal(accumulator.fisher, expected)


# --- batches


def test_padding_on_the_left_predicts_nothing():
    """Where the first token is scored, as in plain text, the padding before it would otherwise predict it."""
    model, rows = build("llama"), sequences(0, 6)
    (right,) = padded(rows, 6)
    right["labels"] = right["input_ids"].masked_fill(right["attention_mask"] == 0, -100)
    left = {
        name: torch.stack([row.roll(-len(sequence)) for row, sequence in zip(value, rows, strict=True)])
        for name, value in right.items()
    }
    assert_close(accumulate(model, [left]), accumulate(model, [right]), 4e-6)


def test_another_ignore_index():
    model = build("llama")
    batches = [batch | {"labels": batch["labels"].masked_fill(batch["labels"] == -100, -1)} for batch in BATCHES]

    def loss(model, inputs, targets):
        return nn.functional.cross_entropy(model(**inputs).logits.flatten(0, 1), targets.flatten(), reduction="sum")

    expected = accumulate(model, BATCHES)
    assert_equal(accumulate(model, batches, ignore_index=-1), expected)
    assert_close(accumulate(model, batches, ignore_index=-1, loss=loss), expected, 1e-6)


@pytest.mark.parametrize(
    "offsets,message",
    [
        ([0, 5, 99], "offsets must end at the number of tokens, 18, but end at 99"),
        ([0, 17], "offsets must end at the number of tokens, 18, but end at 17"),
        ([1, 18], "offsets must start at 0, but start at 1"),
        ([0, 9, 5, 18], r"offsets\[1\] is 9 and offsets\[2\] is 5"),
        ([[0, 18]], r"offsets must have shape \(sequences \+ 1,\), but have \(1, 2\)"),
        ([], r"offsets must have shape \(sequences \+ 1,\), but have \(0,\)"),
    ],
)
def test_offsets_that_do_not_cover_the_tokens(offsets, message):
    model = build("llama")
    batch = {"input_ids": torch.ones(2, 9, dtype=torch.int64), "labels": torch.ones(2, 9, dtype=torch.int64)}
    with FisherAccumulator(model, TARGETS) as accumulator:
        with pytest.raises(ValueError, match=message):
            accumulator.update(batch, offsets)
        accumulator.update(batch)
    assert accumulator.fisher


def test_other_batches_that_do_not_fit():
    model = build("llama")
    data = finite()
    with FisherAccumulator(model, TARGETS) as accumulator:
        with pytest.raises(ValueError, match=r"batch must have labels .*but has none beside \['input_ids'\]"):
            accumulator.update({"input_ids": BATCHES[0]["input_ids"]})
        with pytest.raises(ValueError, match=r"those of shape \(4,\)"):
            accumulator.update({"input_ids": BATCHES[0]["input_ids"], "labels": torch.ones(4)})
    toy = TwoLayers()
    with FisherAccumulator(toy) as accumulator:
        for arguments, message in [
            (([0, 6], [3, 3]), r"label_counts must have one entry per sequence, \(1,\), but has \(2,\)"),
            (([0, 6], [6], 0.0), "loss_scale must be a finite number other than 0, but is 0.0"),
            (([0, 6], [6], torch.tensor(float("inf"))), "loss_scale must be a finite number other than 0, but is inf"),
        ]:
            with pytest.raises(ValueError, match=message), accumulator.sequences(*arguments):
                pass
        with (
            pytest.raises(ValueError, match=r"(good|bad) was given 6 tokens, but offsets end at 5"),
            accumulator.sequences([0, 5], [5]),
        ):
            toy.backward(*data, *data)


def test_no_labels_at_all():
    model = build("llama")
    nothing = BATCHES[0] | {"labels": torch.full_like(BATCHES[0]["labels"], -100)}
    with FisherAccumulator(model, TARGETS) as accumulator:
        assert float(accumulator.update(nothing)) == 0
        with pytest.raises(RuntimeError, match="no labels have been accumulated"):
            _ = accumulator.fisher
        for batch in (BATCHES[0], nothing):  # which then adds nothing
            accumulator.update(batch)
    assert_equal(accumulator.fisher, accumulate(model, BATCHES[:1], target_modules=TARGETS))


# --- layers


def test_targets_that_name_no_layer():
    model = build("gpt2")
    for targets, message in [
        ([], r"got \[\]"),
        (["qproj"], r"by \['qproj'\], got \['qproj'\]; there are transformer\.h\.0\.attn\.c_attn, "),
        (["c_fc", "proj"], r"by \['proj'\]"),  # an end of a name is whole words
        ("c_fc", r"by \['c_fc'\], got 'c_fc'"),  # a pattern matches whole names
    ]:
        with pytest.raises(ValueError, match=r"target_modules selects no nn\.Linear or Conv1D .*" + message):
            FisherAccumulator(model, targets)
    with pytest.raises(ValueError, match="there are none"):
        FisherAccumulator(nn.Embedding(3, 4))
    with pytest.raises(ValueError, match="granularity must be one of sequence, token, batch, but is 'row'"):
        FisherAccumulator(model, granularity="row")


def test_a_weight_shared_with_what_is_no_target():
    message = r"the weight of lm_head is also that of transformer\.wte \(Embedding\), whose share .* would be missed"
    with pytest.raises(ValueError, match=message):
        FisherAccumulator(build("gpt2"), ["lm_head"])
    model = TwoLayers()
    model.bad.weight = model.good.weight
    with pytest.raises(ValueError, match=r"the weight of good is also that of bad \(Linear\)"):
        FisherAccumulator(model, ["good"])


def test_weights_made_anew_for_each_use_are_not_taken_for_one():
    plain, normed = build("llama"), build("llama")
    for layer in normed.model.layers:
        nn.utils.parametrizations.weight_norm(layer.mlp.up_proj)
    expected = accumulate(plain, BATCHES, target_modules=["up_proj"])
    assert_close(accumulate(normed, BATCHES, target_modules=["up_proj"]), expected, 1e-5)


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.expert, self.head = nn.Embedding(61, 8), nn.Linear(8, 8), nn.Linear(8, 61)
        self.unused = nn.Linear(8, 8)

    def forward(self, input_ids: Tensor, routed: bool = False, **_) -> types.SimpleNamespace:
        x = self.embedding(input_ids)
        x = torch.cat([self.expert(x[:, :2]), x[:, 2:]], dim=1) if routed else self.expert(x)
        return types.SimpleNamespace(logits=self.head(x))


def test_layers_that_do_not_see_all_tokens_or_none():
    with (
        FisherAccumulator(Experts(), ["expert"]) as accumulator,
        pytest.raises(ValueError, match=r"expert was given 4 tokens, but offsets end at \d+"),
    ):
        accumulator.update(BATCHES[0] | {"routed": True})
    with FisherAccumulator(Experts()) as accumulator:
        accumulator.update(BATCHES[0])
        with pytest.warns(UserWarning, match="no gradient reached unused: the Fisher information is 0"):
            fisher = accumulator.fisher
    assert not fisher["unused"].any() and fisher["expert"].any()


# --- models that are compiled, or whose logits have an end of their own


@pytest.mark.parametrize("part", ["model", "layer"])
def test_compiled_models(part):
    model = build("llama")
    expected = accumulate(model, BATCHES, target_modules=TARGETS)
    (model if part == "model" else model.model.layers[0]).compile(backend="eager")
    assert_close(accumulate(model, BATCHES, target_modules=TARGETS), expected, 1e-6)


@pytest.mark.parametrize("backend", [None, "eager", "aot_eager"])
@pytest.mark.parametrize("end", [torch.tanh, lambda logits: logits.flatten(0, 1).tanh().view(logits.shape)])
def test_logits_that_the_model_needs_for_its_own_gradient(end, backend):
    class Capped(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = build("llama")

        def forward(self, **inputs):
            return types.SimpleNamespace(logits=end(self.body(**inputs).logits))

    model = Capped()
    if backend is not None:
        model.compile(backend=backend)
    found = accumulate(model, BATCHES[:1], target_modules=TARGETS)

    def loss(model, inputs, targets):
        return nn.functional.cross_entropy(
            model(**inputs).logits.flatten(0, 1), targets.flatten(), reduction="sum", ignore_index=-100
        )

    assert_close(found, accumulate(model, BATCHES[:1], target_modules=TARGETS, loss=loss), 1e-5)
