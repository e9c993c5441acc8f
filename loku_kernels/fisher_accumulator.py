"""Diagonal Fisher information of a whole model's linear layers, gathered during ordinary backward passes.

A layer's weight gradient for a sequence is delta^T a, with a the layer's inputs and delta the gradient at its outputs.
Forward hooks keep a, hooks on the outputs see delta, and ``fisher_accumulate`` adds the square: neither the weights'
requires_grad nor their .grad is needed.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, distributed, nn

from loku_kernels import gemm
from loku_kernels._fisher_batch import Batch, joined, read_batch
from loku_kernels._fisher_layers import Layer, find_layers, in_groups, measured
from loku_kernels._graph import gradient_spares
from loku_kernels._taps import as_computed, keep, kept, require_grad
from loku_kernels.losses import fused_cross_entropy
from loku_kernels.ops import fisher as ops

GRANULARITIES = ("sequence", "token", "batch")
_log = logging.getLogger(__name__)


def sum_of_token_losses(model: nn.Module, inputs: Mapping[str, Any], targets: Tensor) -> Tensor:
    """The summed negative log-likelihood of ``targets``, each token's next one, from the ``logits`` of the model."""
    logits = model(**inputs).logits
    return fused_cross_entropy(logits, targets, reduction="sum", inplace=gradient_spares(logits))


class NoLabelsError(RuntimeError):
    """Fisher information was asked for where no label token has been accumulated."""


class FisherAccumulator:
    """F = sum_s n_s g_s^2 / sum_s n_s for each target weight, elementwise, in float32.

    g_s is the gradient of the token-mean negative log-likelihood of sequence s, n_s the number of its label tokens. F
    does not depend on batch size, padding or packing. ::

        with FisherAccumulator(model, target_modules=["q_proj", "v_proj"]) as accumulator:
            for batch in loader:
                accumulator.update(batch)
        fisher = accumulator.fisher

    Inside the ``with`` block the model's parameters do not require gradients, so none is computed or left behind; on
    leaving it they do again as before. Modes are left alone: call ``model.eval()`` first where there is dropout (except
    that transformers checkpoints in training mode only).

    A layer reached several times in one forward pass, or several layers that share one weight, have their gradients
    added before they are squared. Layers must see all tokens of the batch, in order. Their number is checked: a layer
    that is sent some tokens only, as an expert is, is refused in the backward pass.

    Args:
        model: any nn.Module, also inside DistributedDataParallel; for ``update``, one that is called with the batch and
            returns ``logits``.
        target_modules: which nn.Linear and transformers' Conv1D: names or ends of names ("q_proj", "mlp.c_fc"), a
            regular expression that matches whole names, or None for all but the output head. Layers wrapped by PEFT go
            by the wrapper's name; adapters are not targets. A module that has two names has both in ``fisher``.
        granularity: "sequence" as above. "token" squares every position's outer product by itself:
            F = sum_t (delta_t^T a_t)^2 / sum_s n_s, with delta_t the gradient of the sequence's summed loss at the
            layer's output for position t. "batch" takes a whole micro-batch for one sequence: F depends on its size.
        memory_budget: bytes for Fisher matrices. Where ``accumulators`` full sets (one for the forget set and one for
            the retain set, say) do not fit, the layers are taken in groups; ``passes`` says how many times the data
            must be gone through, with ``groups``.
        loss: what ``update`` differentiates: called with model, batch without labels, and labels already moved to the
            position that predicts them (-100 where there is none), it returns the sum of the tokens' losses.
        ignore_index: the label, in batches, of tokens that are not scored. Nor are those that a token would predict
            which ``attention_mask`` masks out.
        process_group: the ranks whose results are summed; all by default, where torch.distributed is initialised.

    Raises:
        ValueError: targets that name no layer, a weight shared with a module that is not a target, a budget too small
            for one layer.
        FloatingPointError: from ``update`` or ``sequences``, or from ``fisher``, if gradients are NaN or infinite, with
            the layer's name. The sums are spoilt then and not given out any more: go on from the last ``state_dict``.

    Memory: one float32 matrix per target weight (of the group). During a batch, the inputs of the target layers until
    their backward pass has run, of which checkpointing keeps none; for layers used several times also the gradients.
    """

    def __init__(
        self,
        model: nn.Module,
        target_modules: str | Sequence[str] | None = None,
        granularity: str = "sequence",
        *,
        memory_budget: int | None = None,
        accumulators: int = 2,
        loss: Callable[[nn.Module, Mapping[str, Any], Tensor], Tensor] = sum_of_token_losses,
        ignore_index: int = -100,
        process_group: distributed.ProcessGroup | None = None,
    ) -> None:
        if granularity not in GRANULARITIES:
            raise ValueError(f"granularity must be one of {', '.join(GRANULARITIES)}, but is {granularity!r}")
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module  # there is no gradient for it to average
        self.model, self.granularity = model, granularity
        self._loss, self._ignore_index, self._process_group = loss, ignore_index, process_group
        if accumulators < 1:
            raise ValueError(f"accumulators must be at least 1, got {accumulators}")
        self._groups = in_groups(find_layers(model, target_modules), memory_budget, accumulators)
        self._layers: list[Layer] = []
        self._resumed: int | None = None
        self._batch: Batch | None = None
        self._restore: contextlib.ExitStack | None = None
        if self.passes == 1:
            self._begin_group(0)
        else:
            _log.info("Fisher information in %d passes over the data, for %s bytes", self.passes, memory_budget)

    @property
    def passes(self) -> int:
        """How many times the data must be gone through."""
        return len(self._groups)

    def groups(self) -> Iterator[list[str]]:
        """The names of the layers of each pass in turn. Inside the loop ``update`` and ``fisher`` mean these layers;
        their matrices are given up on the way to the next, so hold none of them any longer. After ``load_state_dict``,
        begins with the pass it belongs to."""
        first, resumed = self._resumed or 0, self._resumed
        self._resumed = None
        for index in range(first, self.passes):
            if index != resumed:
                self._begin_group(index)
            yield [layer.name for layer in self._layers]

    def __enter__(self) -> FisherAccumulator:
        if self._restore is not None:
            raise RuntimeError("FisherAccumulator was entered already")
        with contextlib.ExitStack() as stack:
            for parameter in self.model.parameters():
                if parameter.requires_grad:
                    parameter.requires_grad_(False)
                    stack.callback(parameter.requires_grad_, True)
            for module in self.model.modules():
                if isinstance(module, nn.Embedding):
                    stack.callback(module.register_forward_hook(self._keep_alive).remove)
            for group in self._groups:
                for layer in group:
                    hook = functools.partial(self._watch, layer)
                    for module in layer.modules:
                        stack.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
            self._restore = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._restore.close()
        self._restore = None

    def update(self, batch: Mapping[str, Any], offsets: Tensor | Sequence[int] | None = None) -> Tensor:
        """Add a batch: forward, summed loss, backward. Returns the mean loss of its label tokens, without gradient.

        Args:
            batch: what the model is called with, and ``labels`` (batch, tokens), not shifted. Sequences are the rows,
                or in a packed batch what ``position_ids`` that begin anew, or ``cu_seq_lens_q``, say. The model must
                keep packed sequences apart itself.
            offsets: the sequences' bounds, for batches that do not tell.

        Raises:
            ValueError: no ``labels``, or offsets that do not cover the tokens.
        """
        inputs, targets, offsets, counts = read_batch(batch, offsets, self._ignore_index)
        if getattr(getattr(self.model, "config", None), "use_cache", False):
            # With a cache, transformers' models do not look for packed sequences.
            inputs = {"use_cache": False, **inputs}
        with self.sequences(offsets, counts):
            total = self._loss(self.model, inputs, targets)
            total.backward()
        return total.detach() / counts.sum().clamp(min=1)

    @contextlib.contextmanager
    def sequences(
        self, offsets: Tensor | Sequence[int], label_counts: Tensor | Sequence[int], loss_scale: float | Tensor = 1.0
    ) -> Iterator[None]:
        """Around one forward pass and its ``loss.backward()``: what is in the batch. ``update`` is built on it.

        Args:
            offsets: (S + 1,) bounds of the sequences, counted through all rows of the batch, padding included.
            label_counts: (S,) how many labels of each sequence the loss counts.
            loss_scale: the loss divided by the sum of the label tokens' losses: 1 for a sum, 1 / labels for their mean,
                times the factor of a gradient scaler.
        """
        if self._restore is None:
            raise RuntimeError("FisherAccumulator must be entered first: `with FisherAccumulator(...) as accumulator:`")
        if self._batch is not None:
            raise RuntimeError("one batch at a time: `sequences` was entered inside `sequences`")
        self._check_usable("accumulate")
        self._batch = Batch(offsets, label_counts, loss_scale, float(self._unit), self.granularity)
        try:
            yield
            for layer in self._layers:
                self._add(layer)
            if self._batch.label_tokens > 0 and not any(layer.added for layer in self._layers):
                raise RuntimeError(
                    f"no gradient reached {', '.join(layer.name for layer in self._layers)}: the forward pass and its "
                    "loss.backward() belong inside the `sequences` block"
                )
            self._label_tokens += self._batch.label_tokens.to(self._label_tokens)
            self._check_edges()
        except BaseException:
            if self._failure is None and any(layer.added for layer in self._layers):
                self._failure = "a batch was broken off when part of it had been added"
            raise
        finally:
            self._batch = None
            for layer in self._layers:
                layer.begin_batch()

    @property
    def fisher(self) -> dict[str, Tensor]:
        """F by module name, of the shape of the module's weight: (out, in), for Conv1D (in, out).

        These are the accumulator's own tensors, brought to F's scale in place; batches that follow change them. Under
        torch.distributed the ranks' results are summed here, so every rank must ask, and none can add more after.
        Layers that no gradient reached, and whose F is 0, are named in a warning.
        """
        self._check_usable(None)
        self._sum_over_ranks()
        total = float(self._label_tokens)
        if total == 0:
            raise NoLabelsError("no labels have been accumulated")
        for layer in self._layers:
            layer.fisher *= float(self._unit) / total
        self._unit.fill_(total)
        self._check_all()
        return {name: layer.fisher for layer in self._layers for name in layer.names}

    def state_dict(self) -> dict[str, Tensor]:
        """The sums so far; under torch.distributed, this rank's.

        A flat dict of the accumulator's own tensors, like nn.Module's: save or clone them before batches that follow.
        """
        self._check_usable("be saved")
        return {
            **{f"fisher.{layer.name}": layer.fisher for layer in self._layers},
            "unit": self._unit,
            "label_tokens": self._label_tokens,
            "granularity": torch.tensor(GRANULARITIES.index(self.granularity), device="cpu"),
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a ``state_dict`` of the same model, targets, budget and granularity; ValueError if it is not."""
        missing = {"unit", "label_tokens", "granularity"} - state.keys()
        if missing:
            raise ValueError(f"state must be a FisherAccumulator's state_dict, but lacks {', '.join(sorted(missing))}")
        names = {name.removeprefix("fisher.") for name in state if name.startswith("fisher.")}
        index = next((i for i, g in enumerate(self._groups) if names == {layer.name for layer in g}), None)
        if index is None:
            raise ValueError(f"state has the layers {sorted(names)}, which are not those of any pass here")
        group = self._groups[index]
        if int(state["granularity"]) != GRANULARITIES.index(self.granularity):
            known = dict(enumerate(GRANULARITIES)).get(int(state["granularity"]), "something unknown")
            raise ValueError(f"state was accumulated by {known}, but granularity is {self.granularity!r}")
        for layer in group:
            shape = tuple(state[f"fisher.{layer.name}"].shape)
            if shape != layer.shape:
                raise ValueError(f"state has shape {shape} for {layer.name}, whose weight has {layer.shape}")
        self._begin_group(index)
        for layer in group:
            layer.fisher.copy_(state[f"fisher.{layer.name}"]).mul_(float(state["unit"]))
        self._label_tokens.copy_(state["label_tokens"])
        self._resumed = index

    def _begin_group(self, index: int) -> None:
        for layer in self._layers:
            layer.fisher = None
        self._layers = self._groups[index]
        for layer in self._layers:
            layer.allocate()
        # fisher holds sums divided by `unit`; bringing it to F's scale in place saves a second copy of everything.
        self._unit = torch.ones((), dtype=torch.float64, device="cpu")
        self._label_tokens = torch.zeros((), dtype=torch.float64, device=self._layers[0].device)
        self._failure: str | None = None
        self._summed_over_ranks = False

    # The hooks keep count of what runs, which a compiler that traces the model would do once.
    @torch.compiler.disable
    def _keep_alive(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        """Autograd must reach the layers although nothing before them requires a gradient."""
        if self._batch is not None and torch.is_grad_enabled() and not output.requires_grad:
            return require_grad(output)
        return None

    @torch.compiler.disable
    def _watch(self, layer: Layer, module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor | None:
        if self._batch is None or layer.fisher is None:
            return None
        if torch._C._current_graph_task_id() == -1:  # else it is checkpointing's second forward pass
            layer.forwards += 1
        if not torch.is_grad_enabled():
            return None
        inputs = args[0] if args else next(iter(kwargs.values()))
        if not output.requires_grad:
            output = require_grad(output)
        saved = [keep(inputs)]
        as_computed(output).register_hook(functools.partial(self._receive, layer, self._batch, saved))
        return output

    def _receive(self, layer: Layer, batch: Batch, saved: list[Tensor], grad_output: Tensor) -> None:
        if batch is not self._batch:
            raise RuntimeError("loss.backward() was called outside of the `sequences` block of its forward pass")
        if not saved or layer.added:
            raise RuntimeError(f"{layer.name}: a `sequences` block is for one forward and one backward pass")
        inputs = kept(saved.pop())
        inputs, grad_output = inputs.flatten(0, -2), grad_output.detach().flatten(0, -2)
        if len(inputs) != batch.tokens:
            raise ValueError(f"{layer.name} was given {len(inputs)} tokens, but offsets end at {batch.tokens}")
        # Autocast multiplied by inputs of the output's dtype.
        layer.uses.append((inputs.to(grad_output.dtype), grad_output))
        if len(layer.uses) == layer.forwards:
            self._add(layer)

    def _add(self, layer: Layer) -> None:
        """fisher += the squares of the gradients that the uses of this batch make together."""
        uses, layer.uses = layer.uses, []
        if not uses:
            return
        layer.added = True
        offsets, weights = self._batch.on(layer.device, layer.dtype)
        inputs, grads, offsets = joined(uses, offsets)
        if layer.transposed:
            inputs, grads = grads, inputs
        if self.granularity == "token" and len(uses) == 1:
            # Squares of outer products are outer products of squares.
            inputs, grads = inputs.to(layer.dtype).square(), grads.to(layer.dtype).square()
            gemm.add_outer_(layer.fisher, grads, inputs * weights[:, None])
        else:
            ops.fisher_accumulate(layer.fisher, inputs, grads, offsets, weights)

    def _check_edges(self) -> None:
        """A NaN or infinity in a column of delta fills a row of F, and one of a a column: so two edges tell all."""
        added = [layer for layer in self._layers if layer.added]
        self._raise_unless_finite(measured(added, lambda fisher: fisher[0].sum() + fisher[:, 0].sum()))

    def _check_all(self) -> None:
        """What the edges do not show: squares that overflowed."""
        largest = measured(self._layers, torch.amax)
        self._raise_unless_finite(largest)
        unreached = [name for name, value in largest.items() if value == 0]
        if unreached:
            warnings.warn(f"no gradient reached {', '.join(unreached)}: the Fisher information is 0", stacklevel=3)

    def _raise_unless_finite(self, values: Mapping[str, float]) -> None:
        broken = [name for name, value in values.items() if not math.isfinite(value)]
        if broken:
            self._failure = f"NaN or infinite squared gradients in {', '.join(broken)}"
            raise FloatingPointError(self._failure)

    def _check_usable(self, action: str | None) -> None:
        if not self._layers:
            raise RuntimeError(f"memory_budget makes this {self.passes} passes: iterate over `groups()`")
        if self._failure is not None:
            raise RuntimeError(f"the sums are spoilt: {self._failure}")
        if action is not None and self._summed_over_ranks:
            raise RuntimeError(f"the ranks' results have been summed, and can no longer {action}")

    def _sum_over_ranks(self) -> None:
        if self._summed_over_ranks or not (distributed.is_available() and distributed.is_initialized()):
            return
        if distributed.get_world_size(self._process_group) == 1:
            return
        for tensor in (*(layer.fisher for layer in self._layers), self._label_tokens):
            distributed.all_reduce(tensor, group=self._process_group)
        self._summed_over_ranks = True
