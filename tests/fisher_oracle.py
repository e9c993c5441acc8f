"""Data for FisherAccumulator, and what it must give, by definition: one sequence, one backward pass at a time."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Mapping, Sequence

import pytest
import torch
from small_models import VOCABULARY
from torch import Tensor, nn

from loku_kernels import FisherAccumulator
from loku_kernels._fisher_layers import Layer

PROMPT = 2  # tokens at the start of each sequence that are not scored


def sequences(seed: int, count: int = 5) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(4, 12, (count,), generator=generator).tolist()
    return [torch.randint(VOCABULARY, (length,), generator=generator) for length in lengths]


def padded(rows: Sequence[Tensor], size: int, length: int = 0) -> list[dict[str, Tensor]]:
    """Batches of ``size`` sequences, one a row, padded on the right to the longest, or to ``length``."""

    def pad(part: Sequence[Tensor], value: int) -> Tensor:
        found = nn.utils.rnn.pad_sequence(part, True, value)
        return nn.functional.pad(found, (0, max(0, length - found.shape[1])), value=value)

    return [
        {
            "input_ids": pad(part, 0),
            "attention_mask": pad([torch.ones_like(row) for row in part], 0),
            "labels": pad([_labels(row) for row in part], -100),
        }
        for part in groups_of(rows, size)
    ]


def packed(rows: Sequence[Tensor], size: int) -> list[dict[str, Tensor]]:
    """Batches of one row, of ``size`` sequences end to end, with positions that begin anew at each."""
    return [
        {
            "input_ids": torch.cat(part)[None],
            "position_ids": torch.cat([torch.arange(len(row)) for row in part])[None],
            "labels": torch.cat([_labels(row) for row in part])[None],
        }
        for part in groups_of(rows, size)
    ]


def groups_of(rows: Sequence[Tensor], size: int) -> list[Sequence[Tensor]]:
    return [rows[i : i + size] for i in range(0, len(rows), size)]


def explicit_fisher(
    model: nn.Module, groups: Sequence[Sequence[Tensor]], names: Sequence[str], accumulate: torch.dtype = torch.float64
) -> dict[str, Tensor]:
    """sum_b n_b g_b^2 / sum_b n_b, g_b the gradient of the mean loss of a group's n_b labels; groups of one sequence
    give the granularity "sequence". Of the shape of the weights, and in the dtype ``accumulate``."""
    weights = [model.get_submodule(name).weight for name in names]
    required = [weight.requires_grad for weight in weights]
    for weight in weights:
        weight.requires_grad_()
    total = [torch.zeros_like(weight, dtype=accumulate, requires_grad=False) for weight in weights]
    labels = 0
    for group in groups:
        n = sum(len(row) - PROMPT for row in group)
        gradients = [torch.zeros_like(fisher) for fisher in total]
        for row in group:
            found = torch.autograd.grad(summed_loss(model, row), weights, allow_unused=True)
            for gradient, g in zip(gradients, found, strict=True):
                gradient += 0 if g is None else g / n
        for fisher, gradient in zip(total, gradients, strict=True):
            fisher += n * gradient**2
        labels += n
    for weight, was in zip(weights, required, strict=True):
        weight.requires_grad_(was)
    return {name: fisher / labels for name, fisher in zip(names, total, strict=True)}


def explicit_token_fisher(model: nn.Module, rows: Sequence[Tensor], names: Sequence[str]) -> dict[str, Tensor]:
    """sum_t (delta_t^T a_t)^2 / sum_s n_s, with delta the gradients of a sequence's summed loss at the layer's output;
    where a layer is used several times, delta_t^T a_t is the sum over its uses."""
    modules = {name: model.get_submodule(name) for name in names}
    total = {name: torch.zeros_like(module.weight, dtype=torch.float64) for name, module in modules.items()}
    for row in rows:
        uses: list[tuple[str, Tensor, Tensor]] = []

        def keep(name: str, _: nn.Module, args: tuple[Tensor], out: Tensor, uses: list = uses) -> None:
            uses.append((name, args[0].detach(), out))

        hooks = [module.register_forward_hook(functools.partial(keep, name)) for name, module in modules.items()]
        gradients = torch.autograd.grad(summed_loss(model, row), [out for *_, out in uses])
        for hook in hooks:
            hook.remove()
        products = {name: 0 for name in names}
        for (name, a, _), delta in zip(uses, gradients, strict=True):
            conv1d = type(modules[name]).__name__ == "Conv1D"
            products[name] = products[name] + torch.einsum("to,ti->tio" if conv1d else "to,ti->toi", delta[0], a[0])
        for name, product in products.items():
            total[name] += product.double().square().sum(0)
    labels = sum(len(row) - PROMPT for row in rows)
    return {name: fisher / labels for name, fisher in total.items()}


def summed_loss(model: nn.Module, row: Tensor) -> Tensor:
    log_p = model(row[None]).logits[0, PROMPT - 1 : -1].log_softmax(-1)
    return -log_p.gather(1, row[PROMPT:, None]).sum()


def assert_close(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], error: float) -> None:
    """``error`` bounds that of the gradients, relative to the largest: g off by e M changes F = sum n g^2 / sum n, by
    Cauchy and Schwarz, by no more than 2 e M sqrt(F) + e^2 M^2, M^2 being F's largest entry."""
    assert found.keys() == expected.keys()
    for name, truth in expected.items():
        assert found[name].shape == truth.shape, name
        truth, difference = truth.double(), (found[name].double() - truth.double()).abs()
        top = truth.max()
        assert top > 0, name
        excess = (difference - 2 * error * (top * truth).sqrt() - error**2 * top).max()
        assert excess <= 0, f"{name}: error of the gradients {gradient_error(found[name], truth):.2g}"


def gradient_error(found: Tensor, truth: Tensor) -> float:
    """The error of the gradients, relative to the largest, that explains the difference."""
    found, truth = found.double(), truth.double()
    return float((found.sqrt() - truth.sqrt()).abs().max() / truth.max().sqrt())


def _labels(row: Tensor) -> Tensor:
    labels = row.clone()
    labels[:PROMPT] = -100
    return labels


def accumulate(model: nn.Module, batches: list, granularity: str = "sequence", **options) -> dict[str, Tensor]:
    with FisherAccumulator(model, granularity=granularity, **options) as accumulator:
        for batch in batches:
            accumulator.update(batch)
    return accumulator.fisher


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


class TwoLayers(nn.Module):
    """Two layers side by side, whose inputs and gradients a test chooses."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.good, self.bad = nn.Linear(24, 16, bias=False, dtype=dtype), nn.Linear(24, 16, bias=False, dtype=dtype)

    def backward(self, inputs: Tensor, grads: Tensor, bad_inputs: Tensor, bad_grads: Tensor) -> None:
        ((self.good(inputs) * grads).sum() + (self.bad(bad_inputs) * bad_grads).sum()).backward()


def finite(rows: int = 6) -> tuple[Tensor, Tensor]:
    """Inputs and gradients for one of the two layers."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1, rows, 24, generator=generator), torch.randn(1, rows, 16, generator=generator)


def matrices_alive(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of all Fisher matrices alive whenever one is made."""
    alive: list[weakref.ref] = []
    held: list[int] = []
    allocate = Layer.allocate

    def watched(layer: Layer) -> None:
        allocate(layer)
        alive.append(weakref.ref(layer.fisher))
        held.append(sum(matrix.nbytes for matrix in (ref() for ref in alive) if matrix is not None))

    monkeypatch.setattr(Layer, "allocate", watched)
    return held
