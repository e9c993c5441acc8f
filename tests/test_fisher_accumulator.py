"""FisherAccumulator against an explicit loop over sequences, and against itself over other batches of the same data."""

from __future__ import annotations

import copy
import gc
import types
import weakref

import pytest
import torch
from fisher_oracle import (
    PROMPT,
    accumulate,
    assert_close,
    explicit_fisher,
    explicit_token_fisher,
    gradient_error,
    groups_of,
    packed,
    padded,
    sequences,
    summed_loss,
)
from peft import LoraConfig, get_peft_model
from small_models import FAMILIES, VOCABULARY, build
from torch import Tensor, nn

from loku_kernels import FisherAccumulator
from loku_kernels.fisher_accumulator import GRANULARITIES, sum_of_token_losses
from loku_kernels.sequences import label_counts, next_token_labels, sequence_offsets

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning"),  # renamed in transformers 5
]

MODELS = [*FAMILIES, "gpt2"]
ROWS = sequences(0, 6)
# Roundings of the gradients, as multiples of the dtype's eps, relative to the largest gradient of the matrix.
ROUNDINGS = 32


def unit(family: str, dtype: torch.dtype) -> float:
    """GPT-Neo's attention is computed in float32 whatever the model's dtype."""
    return ROUNDINGS * torch.finfo(torch.float32 if family == "gpt_neo" else dtype).eps


def linear_names(model: nn.Module) -> list[str]:
    kinds = ("Linear", "Conv1D")
    return [n for n, m in model.named_modules() if type(m).__name__ in kinds and n != "lm_head"]


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("family", MODELS)
def test_against_an_explicit_loop_in_float64(family, dtype, granularity):
    model = build(family, dtype)
    exact = copy.deepcopy(model).double()
    names = linear_names(model)
    if granularity == "token":
        expected = explicit_token_fisher(exact, ROWS, names)
    else:
        expected = explicit_fisher(exact, groups_of(ROWS, 1 if granularity == "sequence" else 4), names)
    found = accumulate(model, padded(ROWS, 4), granularity)
    assert list(found) == names
    assert {fisher.dtype for fisher in found.values()} == {dtype}
    assert_close(found, expected, unit(family, dtype))


@pytest.mark.parametrize("granularity", ["sequence", "token"])
@pytest.mark.parametrize("family", MODELS)
def test_batch_size_padding_and_packing_do_not_matter(family, granularity):
    """The bound is that of 32 float32 roundings of the gradients: bit for bit the matrix products of another shape are
    not the same, and nothing else may differ."""
    model = build(family)
    expected = accumulate(model, padded(ROWS, 1), granularity)
    for batches in (padded(ROWS, 2), padded(ROWS, 6, length=40), packed(ROWS, 6), packed(ROWS, 4), packed(ROWS, 1)):
        found = accumulate(model, batches, granularity)
        assert_close(found, expected, ROUNDINGS * torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("family", MODELS)
def test_where_first_tokens_are_labelled(family):
    """As in text without a prompt: no token of a packed batch is scored against the next sequence's first."""
    model = build(family)
    expected, found = (
        accumulate(model, [batch | {"labels": batch["input_ids"]} for batch in batches])
        for batches in (padded(ROWS, 1), packed(ROWS, 6))
    )
    assert_close(found, expected, ROUNDINGS * torch.finfo(torch.float32).eps)


def test_bounds_of_sequences():
    """Rows, and where positions begin anew; masked positions are padding, whatever number they bear."""
    labels = torch.zeros(2, 5)
    positions = torch.tensor([[0, 1, 0, 1, 2], [0, 0, 0, 1, 2]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    assert sequence_offsets({"labels": labels, "attention_mask": mask}).tolist() == [0, 5, 10]
    packed_rows = {"labels": labels, "position_ids": positions}
    assert sequence_offsets(packed_rows).tolist() == [0, 2, 5, 6, 7, 10]
    assert sequence_offsets(packed_rows | {"attention_mask": mask}).tolist() == [0, 2, 5, 7, 10]
    assert sequence_offsets({"labels": labels, "position_ids": positions[:1] * 0 + torch.arange(5)}).tolist() == [
        0,
        5,
        10,
    ]
    bounds = torch.tensor([[0, 3, 10]], dtype=torch.int32)
    assert sequence_offsets(packed_rows | {"cu_seq_lens_q": bounds}).tolist() == [0, 3, 10]
    targets = next_token_labels(torch.arange(10).view(2, 5), torch.tensor([0, 0, 2, 5, 10]), -1)
    assert targets.tolist() == [[1, -1, 3, 4, -1], [6, 7, 8, 9, -1]]
    assert label_counts(targets, torch.tensor([0, 0, 2, 5, 10]), -1).tolist() == [0, 1, 2, 4]


def test_sequences_count_by_their_label_tokens():
    """A data set and the same twice over, in any order, have one F; another mixture has another."""
    model = build("llama")
    once = accumulate(model, padded(ROWS, 3))
    assert_close(accumulate(model, padded([*ROWS[::-1], *ROWS], 5)), once, 4e-6)
    other = accumulate(model, padded([*ROWS, ROWS[0]], 3))
    assert max(gradient_error(other[name], once[name]) for name in once) > 1e-3


@pytest.mark.parametrize("family", MODELS)
def test_batch_granularity_is_the_published_programs_importance(family):
    """Per micro-batch: gradient of the model's own loss, a mean over tokens, squared, times the number of labels."""
    model = build(family)
    names = linear_names(model)
    for size in (2, 3):
        total, labels = {name: 0 for name in names}, 0
        for batch in padded(ROWS, size):
            model(**batch).loss.backward()
            n = int((batch["labels"][:, 1:] != -100).sum())
            for name in names:
                total[name] = total[name] + n * model.get_submodule(name).weight.grad ** 2
            labels += n
            model.zero_grad()
        expected = {name: fisher / labels for name, fisher in total.items()}
        assert_close(accumulate(model, padded(ROWS, size), "batch"), expected, 2 * unit(family, torch.float32))
    assert max(gradient_error(total[name] / labels, f) for name, f in accumulate(model, padded(ROWS, 1)).items()) > 1e-2


def without_dropout(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model.train()


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("batches", [padded(ROWS, 3), packed(ROWS, 3)], ids=["padded", "packed"])
@pytest.mark.parametrize("family", MODELS)
def test_gradient_checkpointing_changes_no_bit(family, batches, reentrant):
    model = without_dropout(build(family))
    for granularity in GRANULARITIES:
        model.gradient_checkpointing_disable()
        plain = accumulate(model, batches, granularity)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        assert model.is_gradient_checkpointing and model.training
        found = accumulate(model, batches, granularity)
        assert all(torch.equal(found[name], plain[name]) for name in plain)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_keeps_no_inputs_of_layers(reentrant):
    """Between forward and backward, what a block made inside is gone, unless there is no checkpointing."""
    model = without_dropout(build("llama"))
    inside: list[weakref.ref] = []
    model.model.layers[0].mlp.down_proj.register_forward_hook(lambda _, args, out: inside.append(weakref.ref(args[0])))
    alive = []

    def loss(*arguments):
        inside.clear()
        total = sum_of_token_losses(*arguments)
        gc.collect()
        alive.append(inside[0]() is not None)
        return total

    accumulate(model, padded(ROWS, 6), loss=loss)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    accumulate(model, padded(ROWS, 6), loss=loss)
    assert alive == [True, False]


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_every_layer_is_done_with_during_the_backward_pass(reentrant):
    """Not at its end, until when the gradients at all layers' outputs would be held."""
    model = without_dropout(build("llama"))
    if reentrant is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    with FisherAccumulator(model) as accumulator:
        done = []

        def at_the_bottom(_, args, out):
            if out.requires_grad:
                out.register_hook(lambda grad: done.extend(layer.added for layer in accumulator._layers))

        model.model.embed_tokens.register_forward_hook(at_the_bottom)
        accumulator.update(padded(ROWS, 6)[0])
    assert len(done) == 14 and all(done)


def overall_error(found: dict[str, Tensor], truth: dict[str, Tensor]) -> float:
    difference = sum(float((found[name].double() - truth[name]).norm() ** 2) for name in truth)
    return (difference / sum(float(fisher.norm() ** 2) for fisher in truth.values())) ** 0.5


@pytest.mark.parametrize("batches", [padded(ROWS, 3), packed(ROWS, 6)], ids=["padded", "packed"])
@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("how", ["bfloat16 model", "autocast"])
def test_in_bfloat16_no_worse_than_autograd(family, how, batches):
    """The error against float64 is at most 1.1 times that of single sequences' .grad in the same precision, squared and
    summed in float64: what is left is the model's own rounding."""
    model = build(family, torch.bfloat16 if how == "bfloat16 model" else torch.float32)
    names = linear_names(model)
    exact = explicit_fisher(copy.deepcopy(model).double(), groups_of(ROWS, 1), names)
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        theirs = explicit_fisher(model, groups_of(ROWS, 1), names)
        found = accumulate(model, batches)
    assert {fisher.dtype for fisher in found.values()} == {torch.float32}
    assert overall_error(found, exact) <= 1.1 * overall_error(theirs, exact)
    assert 1e-3 < overall_error(theirs, exact) < 0.1


class Shared(nn.Module):
    """Embedding, two layers of one weight, a layer used twice (once in place of its own input), and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(VOCABULARY, 12)
        self.first, self.second = nn.Linear(12, 12), nn.Linear(12, 12)
        self.second.weight = self.first.weight
        self.twice = nn.Linear(12, 12, bias=False)
        self.once_more = self.twice
        self.head = nn.Linear(12, VOCABULARY)

    def forward(self, input_ids: Tensor, **_) -> types.SimpleNamespace:
        x = self.first(self.embedding(input_ids)).tanh_()
        x = self.twice(self.second(x).relu_())
        x = x + self.once_more(input=x.sin())
        return types.SimpleNamespace(logits=self.head(x))


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("make", [padded, packed])
def test_shared_modules_and_shared_weights(make, granularity):
    """Gradients of all uses are added before they are squared, whichever name they go by."""
    model = Shared().double()
    if granularity == "token":
        expected = _shared_token_fisher(model)
    else:
        groups = groups_of(ROWS, 1 if granularity == "sequence" else 3)
        expected = explicit_fisher(model, groups, ["first", "second", "twice", "once_more", "head"])
    found = accumulate(model, make(ROWS, 3), granularity)
    assert_close(found, expected, 1e-14)
    assert found["first"] is found["second"] and found["twice"] is found["once_more"]
    one_name = accumulate(model, make(ROWS, 3), granularity, target_modules=["once_more"])
    assert list(one_name) == ["once_more"] and torch.equal(one_name["once_more"], found["twice"])


def _shared_token_fisher(model: Shared) -> dict[str, Tensor]:
    """Each use with a weight of its own for every position, so that autograd gives the positions' gradients."""
    labels = sum(len(row) - PROMPT for row in ROWS)
    total = {name: torch.zeros_like(model.get_submodule(name).weight) for name in ("first", "twice", "head")}
    for row in ROWS:
        w = {n: model.get_submodule(n).weight.detach().expand(len(row), -1, -1).clone() for n in total}
        for weight in w.values():
            weight.requires_grad_()

        def linear(name, x, bias, w=w):
            return torch.einsum("toi,ti->to", w[name], x) + (0 if bias is None else bias.detach())

        x = linear("first", model.embedding.weight.detach()[row], model.first.bias).tanh()
        x = linear("twice", linear("first", x, model.second.bias).relu(), None)
        x = x + linear("twice", x.sin(), None)
        log_p = linear("head", x, model.head.bias)[PROMPT - 1 : -1].log_softmax(-1)
        loss = -log_p.gather(1, row[PROMPT:, None]).sum()
        for name, gradient in zip(w, torch.autograd.grad(loss, list(w.values())), strict=True):
            total[name] += gradient.square().sum(0)
    first, twice, head = (fisher / labels for fisher in total.values())
    return {"first": first, "second": first, "twice": twice, "once_more": twice, "head": head}


@pytest.mark.parametrize("family", MODELS)
def test_models_wrapped_by_peft(family):
    """Targets go by the names of the base model's layers, and adapters neither are targets nor change."""
    base = build(family, torch.float64)
    saved = ["lm_head"] if family in ("phi", "llama") else None  # in the others it is tied
    config = LoraConfig(target_modules="all-linear", modules_to_save=saved, r=2, fan_in_fan_out=family == "gpt2")
    expected = accumulate(copy.deepcopy(base), padded(ROWS, 3))
    model = get_peft_model(base, config).eval()
    before = {name: p.clone() for name, p in model.named_parameters()}
    required = [p.requires_grad for p in model.parameters()]
    found = accumulate(model, padded(ROWS, 3))
    prefix = "base_model.model."
    assert [name.removeprefix(prefix) for name in found] == list(expected)
    for name, fisher in expected.items():
        torch.testing.assert_close(found[prefix + name], fisher)
    end = next(reversed(expected)).rpartition(".")[2]
    some = accumulate(model.get_base_model(), padded(ROWS, 3), target_modules=[end])
    assert len(some) >= 2 and all(torch.equal(some[name], found[prefix + name]) for name in some)
    assert [p.requires_grad for p in model.parameters()] == required
    assert all(p.grad is None and torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_an_active_adapter_is_part_of_the_model():
    """F is that of the base weights at the function that the model computes with its adapter."""
    base = build("llama", torch.float64)
    model = get_peft_model(copy.deepcopy(base), LoraConfig(target_modules=["q_proj", "up_proj"], r=2))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1, generator=torch.Generator().manual_seed(0))
    merged = accumulate(copy.deepcopy(model).merge_and_unload(), padded(ROWS, 3))
    found = accumulate(model, padded(ROWS, 3), target_modules=["q_proj", "up_proj", "down_proj"])
    for name, fisher in found.items():
        torch.testing.assert_close(fisher, merged[name.removeprefix("base_model.model.")])
    assert len(found) == 6


def test_targets_by_name_pattern_or_all():
    model = build("gpt2")
    batches = padded(ROWS, 3)
    every = accumulate(model, batches)
    assert list(every) == linear_names(model) and len(every) == 8
    by_end = accumulate(model, batches, target_modules=["mlp.c_proj", "transformer.h.0.attn.c_attn"])
    assert list(by_end) == ["transformer.h.0.attn.c_attn", "transformer.h.0.mlp.c_proj", "transformer.h.1.mlp.c_proj"]
    by_pattern = accumulate(model, batches, target_modules=r".*\.h\.1\..*")
    assert list(by_pattern) == [name for name in every if ".h.1." in name]
    for some in (by_end, by_pattern):
        assert all(torch.equal(fisher, every[name]) for name, fisher in some.items())
    head = accumulate(build("llama"), batches, target_modules=["lm_head"])
    assert head["lm_head"].shape == (VOCABULARY, 32)


@pytest.mark.parametrize("loss_scale", ["mean", "gradient scaler"])
def test_around_a_loop_of_ones_own(loss_scale):
    """`sequences`, with the model's own loss and its backward pass inside."""
    model = build("phi")
    expected = accumulate(model, padded(ROWS, 3))
    with FisherAccumulator(model) as accumulator:
        for batch in padded(ROWS, 3):
            counts = (batch["labels"] != -100).sum(1)
            length = batch["labels"].shape[1]
            factor = torch.tensor(1024.0) if loss_scale == "gradient scaler" else 1.0
            with accumulator.sequences(torch.arange(4) * length, counts, loss_scale=factor / counts.sum()):
                (factor * model(**batch, use_cache=False).loss).backward()
    assert_close(accumulator.fisher, expected, 4e-6)


def test_bounds_from_offsets_and_cu_seq_lens():
    """A batch that says nothing of its sequences is told; what it says is understood."""
    model = build("llama")
    expected = accumulate(model, padded(ROWS, 1))
    (batch,) = packed(ROWS, 6)
    bounds = [0, *torch.tensor([len(row) for row in ROWS]).cumsum(0).tolist()]
    silent = dict(batch)
    positions = silent.pop("position_ids")

    def loss(model, inputs, targets):
        return sum_of_token_losses(model, inputs | {"position_ids": positions, "cu_seq_lens_q": None}, targets)

    for extra, offsets in (
        ({}, bounds),
        ({}, torch.tensor(bounds, dtype=torch.int32)),
        ({"cu_seq_lens_q": bounds}, None),
    ):
        named = {name: torch.tensor(value, dtype=torch.int32) for name, value in extra.items()}
        with FisherAccumulator(model, loss=loss) as accumulator:
            mean = accumulator.update(silent | named, offsets)
        assert_close(accumulator.fisher, expected, 4e-6)
    with torch.no_grad():
        nll = sum(float(summed_loss(model, row)) for row in ROWS)
    assert float(mean) == pytest.approx(nll / sum(len(row) - PROMPT for row in ROWS), rel=1e-5)
    assert not mean.requires_grad
