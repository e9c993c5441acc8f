"""The methods: which sequences each needs, whether a reference, and its formula.

The *reference* is the model before unlearning: the same model with its adapter off. Means over tokens run over all
scored tokens of a role, means over sequences over all its sequences, in the whole batch of an optimiser step: all
micro-batches that are accumulated, on all processes.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

from loku.data import Role
from loku.training.scores import Scores, kl_divergence

OPTIONS = ("retain_weight", "beta", "gamma")


class Totals(NamedTuple):
    """What the means divide by: scored tokens and sequences of each role, (3,) int64 each."""

    tokens: Tensor
    sequences: Tensor

    @classmethod
    def of(cls, batch: Mapping[str, Tensor]) -> Totals:
        """Of one batch of `loku.data.UnlearningCollator`."""
        roles, count = batch["roles"], len(Role)
        tokens = torch.bincount(roles[batch["row_sequences"]], minlength=count)
        return cls(tokens, torch.bincount(roles, minlength=count))


class Loss(NamedTuple):
    """``value`` is what is minimised; ``parts`` its terms before weighting, by name, without gradient, for the log."""

    value: Tensor
    parts: dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """One way to forget.

    Attributes:
        name: as it is asked for.
        retain_weight: of what is asked of the retain sequences, finite, at least 0; at 0 they are not needed.
        fila: whether the adapter must have been started by `loku.fila.initialize_lora_fila_weights`.
        reference: whether the reference's scores of the same batch are needed.
    """

    name: str
    retain_weight: float = 0.0
    fila: bool = False
    reference: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.retain_weight < math.inf:
            raise ValueError(f"retain_weight must be finite and at least 0, got {self.retain_weight}")
        if not self.roles:
            raise ValueError(f"retain_weight must be positive for method {self.name!r}, which has no other term")

    @property
    def roles(self) -> tuple[Role, ...]:
        """The roles whose sequences are needed; an epoch is one pass over those of the first."""
        return (Role.FORGET, Role.RETAIN) if self.retain_weight > 0 else (Role.FORGET,)

    def check_roles(self, present: Set[Role]) -> None:
        """ValueError unless sequences of these roles are all that one of the loss's terms needs."""
        needed = set(self.roles)
        forget = needed - {Role.RETAIN}
        if not present & needed or present & forget not in (set(), forget):
            raise ValueError(
                f"method {self.name!r} scores {_names(self.roles)} sequences, but was given {_names(present)} alone"
            )

    @abstractmethod
    def loss(self, scores: Scores, reference: Scores | None, totals: Totals) -> Loss:
        """A batch's share of the loss; over the batches that ``totals`` counts together, the shares sum to the loss."""


@dataclass(frozen=True, kw_only=True)
class TokenMethod(Method):
    """forget_ihl * mean IHL(forget) + forget_ce * mean CE(forget) + retain_weight * mean CE(retain), in one pass.

    IHL = 1 + p_t - max over v != t of p_v and CE = -log p_t (LoKU, arXiv 2408.06621, section 3.2). CE with weight -1 is
    gradient ascent, with the retain term gradient difference (TOFU, arXiv 2401.06121, section 3.2).
    """

    forget_ihl: float = 0.0
    forget_ce: float = 0.0

    @property
    def roles(self) -> tuple[Role, ...]:
        weights = {Role.FORGET: self.forget_ihl or self.forget_ce, Role.RETAIN: self.retain_weight}
        return tuple(role for role, weight in weights.items() if weight)

    def loss(self, scores: Scores, reference: Scores | None, totals: Totals) -> Loss:
        forget, retain = (_mean_weights(scores, role, totals) for role in (Role.FORGET, Role.RETAIN))
        ce_weight = self.forget_ce * forget + self.retain_weight * retain
        value, rows = scores.unlearning_loss(self.forget_ihl * forget, ce_weight)
        parts = {}
        if Role.FORGET in self.roles:
            parts["forget_loss"] = torch.where(forget > 0, rows, 0).sum()
        if Role.RETAIN in self.roles:
            parts["retain_loss"] = torch.where(retain > 0, rows, 0).sum() / self.retain_weight
        return Loss(value, parts)


@dataclass(frozen=True, kw_only=True)
class KLMinimisation(Method):
    """-mean CE(forget) + retain_weight * mean over retain tokens of KL(p_reference || p) (TOFU, section 3.2)."""

    reference: bool = True

    def loss(self, scores: Scores, reference: Scores | None, totals: Totals) -> Loss:
        ascent = -_mean_weights(scores, Role.FORGET, totals)
        value, _ = scores.unlearning_loss(torch.zeros_like(ascent), ascent)
        parts = {"forget_loss": value.detach()}
        if self.retain_weight > 0:
            retain = kl_divergence(reference.of(Role.RETAIN), scores.of(Role.RETAIN))
            retain = retain / totals.tokens[Role.RETAIN].clamp(min=1)
            value = value + self.retain_weight * retain
            parts["retain_loss"] = retain.detach()
        return Loss(value, parts)


@dataclass(frozen=True, kw_only=True)
class SequenceMethod(Method):
    """mean over forget sequences of `forget_losses` + retain_weight * mean CE(retain).

    With log p of a sequence the sum over its scored tokens; for a method with a reference, log p - log p_reference.

    Attributes:
        beta: inverse temperature, positive and finite.
    """

    beta: float

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.beta < math.inf:
            raise ValueError(f"beta must be positive and finite, got {self.beta}")

    @abstractmethod
    def forget_losses(self, log_p: Tensor, scores: Scores) -> Tensor:
        """One loss for each forget sequence, from ``log_p`` (S,) of all sequences."""

    def loss(self, scores: Scores, reference: Scores | None, totals: Totals) -> Loss:
        rows = scores.log_probabilities()
        log_p = scores.sum_by_sequence(rows)
        if self.reference:
            reference = reference.of(Role.FORGET, Role.PREFERRED)
            log_p = log_p - reference.sum_by_sequence(reference.log_probabilities())
        value = self.forget_losses(log_p, scores).sum() / totals.sequences[Role.FORGET].clamp(min=1)
        parts = {"forget_loss": value.detach()}
        if self.retain_weight > 0:
            retain = -(_mean_weights(scores, Role.RETAIN, totals) * rows).sum()
            value = value + self.retain_weight * retain
            parts["retain_loss"] = retain.detach()
        return Loss(value, parts)


@dataclass(frozen=True, kw_only=True)
class NPO(SequenceMethod):
    """2 / beta * log(1 + (p / p_reference)^beta): negative preference optimisation (arXiv 2404.05868, equation 3)."""

    beta: float = 0.1
    reference: bool = True

    def forget_losses(self, log_p: Tensor, scores: Scores) -> Tensor:
        return 2 / self.beta * softplus(self.beta * log_p[scores.roles == Role.FORGET])


@dataclass(frozen=True, kw_only=True)
class SimNPO(SequenceMethod):
    """-2 / beta * log sigmoid(-beta / length * log p - gamma): NPO without a reference (arXiv 2410.07163, equation 4).

    Attributes:
        gamma: margin of the reward, finite.
    """

    beta: float = 2.5
    gamma: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not math.isfinite(self.gamma):
            raise ValueError(f"gamma must be finite, got {self.gamma}")

    def forget_losses(self, log_p: Tensor, scores: Scores) -> Tensor:
        forget = scores.roles == Role.FORGET
        reward = log_p[forget] / scores.sequence_lengths()[forget]
        return -2 / self.beta * logsigmoid(-self.beta * reward - self.gamma)


@dataclass(frozen=True, kw_only=True)
class DPO(SequenceMethod):
    """-log sigmoid(beta * (log-ratio of the preferred answer - that of the forget answer)) (arXiv 2305.18290, eq. 7).

    Preferred, in unlearning, are refusals to answer (TOFU, section 3.2).
    """

    beta: float = 0.1
    reference: bool = True

    @property
    def roles(self) -> tuple[Role, ...]:
        return (*super().roles, Role.PREFERRED)

    def forget_losses(self, log_p: Tensor, scores: Scores) -> Tensor:
        preferred, forget = (log_p[scores.roles == role] for role in (Role.PREFERRED, Role.FORGET))
        return -logsigmoid(self.beta * (preferred - forget))


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        TokenMethod(name="loku", forget_ihl=1.0, retain_weight=1.0, fila=True),
        TokenMethod(name="ihl", forget_ihl=1.0, retain_weight=1.0),
        TokenMethod(name="gd", forget_ce=-1.0, retain_weight=1.0),
        TokenMethod(name="gd+fila", forget_ce=-1.0, retain_weight=1.0, fila=True),
        TokenMethod(name="ga", forget_ce=-1.0),
        KLMinimisation(name="kl", retain_weight=1.0),
        NPO(name="npo"),
        SimNPO(name="simnpo"),
        DPO(name="dpo"),
        TokenMethod(name="finetune", retain_weight=1.0),
    )
}
"""The methods by name, with their published settings; ``finetune`` is ordinary training on the retain sequences."""


def get_method(name: str, **options: float | None) -> Method:
    """The method of `METHODS` with that name, with other options where they are given and not None.

    Args:
        options: ``retain_weight``; ``beta`` for npo, simnpo and dpo; ``gamma`` for simnpo.

    Raises:
        ValueError: there is no such method, it has no such option, or the value is out of range.
    """
    if name not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {name!r}")
    method = METHODS[name]
    given = {option: value for option, value in options.items() if value is not None}
    known = [option for option in OPTIONS if option in {field.name for field in fields(method)}]
    for option in given:
        if option not in known:
            raise ValueError(f"method {name!r} has no option {option!r}; it has {', '.join(known)}")
    return replace(method, **given)


def _names(roles: Iterable[Role]) -> str:
    return " and ".join(role.name.lower() for role in sorted(roles))


def _mean_weights(scores: Scores, role: Role, totals: Totals) -> Tensor:
    """(K,) one over the number of the role's tokens at its tokens, 0 elsewhere."""
    return (scores.row_roles == role).to(scores.dtype) / totals.tokens[role].clamp(min=1)
