"""What one forward pass offers to a method: losses and log probabilities of the scored tokens, and no more.

The same from hidden states, where the logits exist one chunk of rows at a time and only of scored tokens, and from a
model's own logits, where its head cannot be taken over.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div, log_softmax
from torch.utils.checkpoint import checkpoint
from transformers.utils import logging

from loku.data import IGNORE_INDEX, MODEL_INPUTS, Role
from loku.head import HeadRefused, OutputHead, head_refusal, hidden_states, run
from loku_kernels import (
    TargetStatistics,
    fused_linear_unlearning_loss,
    fused_unlearning_loss,
    linear_target_statistics,
    target_statistics,
)
from loku_kernels.launch import chunk_rows

logger = logging.get_logger(__name__)
_KL_CHUNK_BYTES = 32 << 20  # of float32 logits; a chunk of them takes a few times as much


@dataclass(frozen=True)
class Scores(ABC):
    """K scored tokens of S sequences.

    Attributes:
        roles: (S,) the `Role` of each sequence.
        row_sequences: (K,) the sequence of each scored token.
        targets: (K,) the token that should be predicted.
        chunk_bytes: most bytes of logits at a time; None for the kernels' own choice.
    """

    roles: Tensor
    row_sequences: Tensor
    targets: Tensor
    chunk_bytes: int | None

    @property
    def row_roles(self) -> Tensor:
        """(K,) the role of each scored token's sequence."""
        return self.roles[self.row_sequences]

    def of(self, *roles: Role) -> Scores:
        """The scored tokens of these roles; sequences keep their numbers."""
        return self._select(torch.isin(self.row_roles, torch.tensor(roles, device=self.roles.device)))

    @property
    def dtype(self) -> torch.dtype:
        """Of losses and log probabilities: float32, or float64 for a model in float64."""
        return torch.promote_types(self._source.dtype, torch.float32)

    @property
    @abstractmethod
    def vocabulary(self) -> int:
        """V."""

    @abstractmethod
    def unlearning_loss(self, ihl_weight: Tensor, ce_weight: Tensor) -> tuple[Tensor, Tensor]:
        """sum_k ihl_weight_k IHL_k + ce_weight_k CE_k, and its K terms without gradient; the weights are (K,)."""

    def log_probabilities(self) -> Tensor:
        """(K,) log p of the targets, differentiable, accurate also where p is close to 1."""
        return self._statistics().log_probability

    def sum_by_sequence(self, rows: Tensor) -> Tensor:
        """(S,) sums of (K,) over each sequence's scored tokens; 0 for one that has none here."""
        return rows.new_zeros(len(self.roles)).index_add(0, self.row_sequences, rows)

    def sequence_lengths(self) -> Tensor:
        """(S,) scored tokens of each sequence, int64."""
        return torch.bincount(self.row_sequences, minlength=len(self.roles))

    @abstractmethod
    def logits(self, rows: slice) -> Tensor:
        """(rows, V), in float32 at least: a chunk of what should not be held at once."""

    @property
    @abstractmethod
    def _source(self) -> Tensor:
        """What the scores are computed from."""

    @abstractmethod
    def _select(self, chosen: Tensor) -> Scores:
        """With the rows where ``chosen`` (K,) is true."""

    @abstractmethod
    def _statistics(self) -> TargetStatistics:
        """Of the K rows."""


@dataclass(frozen=True)
class HiddenScores(Scores):
    """From hidden states (K, D) and the head."""

    hidden: Tensor
    head: OutputHead

    @property
    def vocabulary(self) -> int:
        return self.head.weight.shape[0]

    @property
    def _source(self) -> Tensor:
        return self.hidden

    def unlearning_loss(self, ihl_weight: Tensor, ce_weight: Tensor) -> tuple[Tensor, Tensor]:
        weights, options = (ihl_weight, ce_weight), {"reduction": "sum", "return_statistics": True}
        with self.head.autocasting():
            loss, rows = fused_linear_unlearning_loss(*self._operands(), *weights, **self._head_options(), **options)
        return loss, rows.loss

    def logits(self, rows: slice) -> Tensor:
        return self.head.logits(self.hidden[rows])

    def _select(self, chosen: Tensor) -> HiddenScores:
        rows = {name: getattr(self, name)[chosen] for name in ("row_sequences", "targets", "hidden")}
        return replace(self, **rows)

    def _statistics(self) -> TargetStatistics:
        with self.head.autocasting():
            return linear_target_statistics(*self._operands(), **self._head_options())

    def _operands(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.hidden, self.head.weight, self.targets

    def _head_options(self) -> dict[str, object]:
        head = self.head
        transform = {"logit_scale": head.scale, "logit_softcap": head.softcap}
        return {"bias": head.bias, **transform, "chunk_bytes": self.chunk_bytes}


@dataclass(frozen=True)
class LogitScores(Scores):
    """From the logits (N, V) of all tokens, of which ``rows`` (K,) are scored; they are not copied."""

    all_logits: Tensor
    rows: Tensor

    @property
    def vocabulary(self) -> int:
        return self.all_logits.shape[-1]

    @property
    def _source(self) -> Tensor:
        return self.all_logits

    def unlearning_loss(self, ihl_weight: Tensor, ce_weight: Tensor) -> tuple[Tensor, Tensor]:
        weights = (self._spread(weight, 0) for weight in (ihl_weight, ce_weight))
        options = {"reduction": "sum", "return_statistics": True}
        loss, rows = fused_unlearning_loss(self.all_logits, self._labels(), *weights, **options)
        return loss, rows.loss[self.rows]

    def logits(self, rows: slice) -> Tensor:
        logits = self.all_logits[self.rows[rows]]
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def _select(self, chosen: Tensor) -> LogitScores:
        return replace(self, **{name: getattr(self, name)[chosen] for name in ("row_sequences", "targets", "rows")})

    def _statistics(self) -> TargetStatistics:
        found = target_statistics(self.all_logits, self._labels())
        return TargetStatistics(*(field[self.rows] for field in found))

    def _labels(self) -> Tensor:
        return self._spread(self.targets, IGNORE_INDEX)

    def _spread(self, values: Tensor, fill: int) -> Tensor:
        return values.new_full((len(self.all_logits),), fill).index_copy(0, self.rows, values)


class Scorer:
    """scorer(model, batch) -> Scores, from hidden states where that gives the model's own logits.

    Whether it does is measured once, on the bare model: see `loku.head`. Where it does not, the model computes
    its logits: LoRA on the head, a quantised, offloaded or compiled head, FSDP, ZeRO-3, and models that do more to
    their logits than scale and cap them.

    Attributes:
        refusal: why the logits are used; None if they are not.
    """

    def __init__(self, model: nn.Module, chunk_bytes: int | None = None) -> None:
        self.chunk_bytes = chunk_bytes
        self.refusal = head_refusal(model)
        if self.refusal is not None:
            self._warn()

    def __call__(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Scores:
        """One forward pass of ``model``, bare or wrapped, over a batch of `loku.data.UnlearningCollator`."""
        inputs = {name: batch[name] for name in MODEL_INPUTS if name in batch}
        of_rows = {name: batch[name] for name in ("roles", "row_sequences", "targets")}
        rows = batch["rows"]
        if self.refusal is None:
            try:
                hidden, head = hidden_states(model, inputs)
            except HeadRefused as error:
                self.refusal = str(error)
                self._warn()
            else:
                return HiddenScores(
                    **of_rows, chunk_bytes=self.chunk_bytes, hidden=hidden.flatten(0, 1)[rows], head=head
                )
        logits = run(model, inputs).logits
        if logits.shape[:2] != batch["input_ids"].shape:
            raise ValueError(
                f"the model makes logits of shape {tuple(logits.shape)} of input_ids of shape "
                f"{tuple(batch['input_ids'].shape)}, as with virtual tokens (prompt tuning), which are not served"
            )
        return LogitScores(**of_rows, chunk_bytes=self.chunk_bytes, all_logits=logits.flatten(0, 1), rows=rows)

    def _warn(self) -> None:
        logger.warning_once(f"Losses come from the model's own logits, which takes more memory: {self.refusal}.")


def kl_divergence(reference: Scores, scores: Scores) -> Tensor:
    """sum_k KL(p_reference || p) over the K rows, whose logits are formed, and formed again in backward, in chunks."""

    def of_chunk(rows: slice) -> Tensor:
        log_p = log_softmax(scores.logits(rows), dim=-1)
        return kl_div(log_p, log_softmax(reference.logits(rows), dim=-1), reduction="sum", log_target=True)

    count = len(scores.targets)
    height = chunk_rows(count, scores.vocabulary, 4, scores.chunk_bytes or _KL_CHUNK_BYTES)
    chunks = (slice(start, start + height) for start in range(0, count, height))
    terms = (checkpoint(of_chunk, rows, use_reentrant=False, preserve_rng_state=False) for rows in chunks)
    return sum(terms, start=torch.zeros((), device=scores.targets.device))
