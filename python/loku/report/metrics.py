"""What the names of metrics mean: how to write them, which way is better, and numbers to show."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

_SUBSCRIPTS = str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉")
_KNOWN = (  # (pattern, label, role, better), in the order of tables and plots
    (r"el_(\d+)", "EL", "forgetting", "lower"),
    (r"ma", "MA", "forgetting", "lower"),
    (r"forget_rouge\w*", "Forget ROUGE-L", "forgetting", "lower"),
    (r"forget_prob(ability)?", "Forget probability", "forgetting", "lower"),
    (r"forget_loss", "Forget loss", "forgetting", "higher"),
    (r"log10_forget_quality", "log₁₀ forget quality", "forgetting", "higher"),
    (r"model_utility", "Model utility", "utility", "higher"),
    (r"perplexity|(.+) perplexity", "Perplexity", "utility", "lower"),
    (r"retain_rouge\w*", "Retain ROUGE-L", "utility", "higher"),
    (r"retain_loss", "Retain loss", "utility", "lower"),
)
ABSENT = "—"
_UNITS = {"seconds": "(s)", "mib": "(MiB)"}


@dataclass(frozen=True)
class Metric:
    """A quantity that a model is evaluated for.

    ``role`` says what it is evidence of; ``"other"`` metrics are in the tables only. ``better`` is None where neither
    direction is.
    """

    key: str
    label: str
    role: Literal["forgetting", "utility", "other"]
    better: Literal["lower", "higher"] | None
    order: int

    @property
    def title(self) -> str:
        return self.label if self.better is None else f"{self.label} ({self.better} is better)"


def metric(key: str) -> Metric:
    for order, (pattern, label, role, better) in enumerate(_KNOWN):
        if match := re.fullmatch(pattern, key):
            return Metric(key, label + _detail(label, *match.groups()), role, better, order)
    return Metric(key, key.replace("_", " ").capitalize(), "other", None, len(_KNOWN))


def _detail(label: str, what: str | None = None) -> str:
    """EL has its length for a subscript, and perplexity, of several texts, which one."""
    if what is None or label not in ("EL", "Perplexity"):
        return ""
    return what.translate(_SUBSCRIPTS) if label == "EL" else f" of {what}"


def ordered(keys: set[str]) -> list[Metric]:
    """Forgetting, then utility, then the others by name. A forget quality is shown by its logarithm only."""
    return sorted((metric(key) for key in keys - {"forget_quality"}), key=lambda m: (m.order, len(m.key), m.key))


def cost_label(key: str) -> str:
    """``peak_memory_mib`` to "Peak memory (MiB)", ``seconds`` to "Time (s)"."""
    words = key.split("_")
    unit = _UNITS.get(words[-1]) if words[-2:-1] != ["per"] else None
    if unit is None:
        return " ".join(words).capitalize()
    return f"{' '.join(words[:-1]).capitalize() or 'Time'} {unit}"


def with_logarithm(values: dict[str, float]) -> dict[str, float]:
    """``log10_forget_quality`` beside ``forget_quality``: p-values differ by orders of magnitude, so a mean of them
    over seeds would be that of the largest alone."""
    if "forget_quality" not in values:
        return values
    p = values["forget_quality"]
    return {**values, "log10_forget_quality": math.log10(p) if p > 0 else -math.inf if p == 0 else math.nan}


def show(value: float, std: float | None = None) -> str:
    """About three significant digits; the standard deviation with as many decimals as its mean, and left out where
    that makes it 0, or it is None."""
    spread = format(std or 0.0, _style(value))
    if float(spread.replace(",", "")) == 0:
        return format(value, ",.0f" if value.is_integer() else _style(value))
    return f"{format(value, _style(value))} ± {spread}"


def _style(value: float) -> str:
    size = abs(value)
    if 0 < size < 0.001:
        return ".1e"
    decimals = next((decimals for bound, decimals in ((1, 3), (100, 2), (1000, 1)) if size < bound), 0)
    return f",.{decimals}f"


def evidence(metrics: Iterable[Metric]) -> list[Metric]:
    """What a report shows first: the loss on the forget set only where nothing else tells of forgetting."""
    found = [m for m in metrics if m.role != "other"]
    has_better = any(m.role == "forgetting" and m.key != "forget_loss" for m in found)
    return [m for m in found if m.key != "forget_loss" or not has_better]
