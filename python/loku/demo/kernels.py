"""``python -m loku.demo.kernels [--out demo.png]``: what the kernels compute, and their time and peak memory."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from loku.formulations import authors_ihl, eager_ihl
from loku.measuring import MIB, peak_memory, timer
from loku_kernels import fused_ihl, fused_linear_ihl

ROWS, VOCABULARY, HIDDEN = 512, 50257, 768
ROUNDS = 5
TOKENS = ["the", "her", "his", "my", "a", "no"]
LOGITS = [1.0, 4.0, 2.5, 0.5, 0.0, -1.0]
TARGET = 1


@dataclass
class Candidate:
    """One way to the loss and its gradient, and what was measured of it."""

    name: str
    run: Callable[[], object]
    times_ms: list[float] = field(default_factory=list)
    peak_mib: float = 0.0

    @property
    def median_ms(self) -> float:
        return statistics.median(self.times_ms)


def gradient_of(loss: Callable[[Tensor, Tensor], Tensor], logits: Tensor, labels: Tensor) -> Tensor:
    return torch.autograd.grad(loss(logits, labels), logits)[0]


def show_one_row(console: Console) -> None:
    """One row of logits: probabilities, loss, and the gradient beside autograd's."""
    logits, label = torch.tensor([LOGITS], requires_grad=True), torch.tensor([TARGET])
    loss, found = fused_ihl(logits, label, return_statistics=True)
    ours, autograd = gradient_of(fused_ihl, logits, label), gradient_of(eager_ihl, logits, label)
    table = Table(title="One row of logits")
    for heading in ("token", "logit", "p", "gradient", "autograd's"):
        table.add_column(heading, justify="right")
    rows = zip(logits[0].tolist(), logits[0].softmax(0).tolist(), ours[0].tolist(), autograd[0].tolist(), strict=True)
    for column, (token, (z, p, mine, theirs)) in enumerate(zip(TOKENS, rows, strict=True)):
        role = {TARGET: " (target)", found.runner_up_index.item(): " (runner-up)"}.get(column, "")
        table.add_row(token + role, f"{z:.1f}", f"{p:.4f}", f"{mine:+.6f}", f"{theirs:+.6f}")
    console.print(table)
    p_t, p_m = found.target_probability.item(), found.runner_up_probability.item()
    console.print(f"loss = 1 + p_target - p_runner_up = 1 + {p_t:.4f} - {p_m:.4f} = {loss.item():.4f}")


def show_memorised_row(console: Console) -> None:
    """Where the target is all but certain, as it is in memorised text, the usual formulas cancel."""
    table = Table(title="Largest relative error of a float32 gradient, against float64")
    for heading in ("1 - p_target", "fused_ihl", "torch eager"):
        table.add_column(heading, justify="right")
    label = torch.tensor([TARGET])
    for lead in (5.0, 15.0, 25.0):
        row = torch.tensor([LOGITS])
        row[0, TARGET] += lead
        exact = row.double().requires_grad_()
        truth = gradient_of(fused_ihl, exact, label)
        row.requires_grad_()
        errors = (((gradient_of(f, row, label) - truth) / truth).abs().max().item() for f in (fused_ihl, eager_ihl))
        others = exact.detach().softmax(1)[0].tolist()
        del others[TARGET]
        table.add_row(f"{sum(others):.0e}", *(f"{error:.0e}" for error in errors))
    console.print(table)


def from_logits(device: torch.device) -> list[Candidate]:
    logits = torch.randn(ROWS, VOCABULARY, device=device, requires_grad=True)
    overwritten = logits.detach().clone().requires_grad_()
    labels = torch.randint(0, VOCABULARY, (ROWS,), device=device)
    return [
        Candidate("fused_ihl", lambda: gradient_of(fused_ihl, logits, labels)),
        Candidate(
            "fused_ihl(inplace=True)",
            lambda: gradient_of(lambda z, t: fused_ihl(z, t, inplace=True), overwritten, labels),
        ),
        Candidate("torch eager", lambda: gradient_of(eager_ihl, logits, labels)),
        Candidate("authors' formulation", lambda: gradient_of(authors_ihl, logits, labels)),
    ]


def from_hidden_states(device: torch.device) -> list[Candidate]:
    hidden = torch.randn(ROWS, HIDDEN, device=device, requires_grad=True)
    weight = torch.randn(VOCABULARY, HIDDEN, device=device) / HIDDEN**0.5
    labels = torch.randint(0, VOCABULARY, (ROWS,), device=device)

    def over_logits(loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], Tensor]:
        return lambda: gradient_of(lambda h, t: loss(torch.nn.functional.linear(h, weight), t), hidden, labels)

    return [
        Candidate("fused_linear_ihl", lambda: gradient_of(lambda h, t: fused_linear_ihl(h, weight, t), hidden, labels)),
        Candidate("torch eager", over_logits(eager_ihl)),
        Candidate("authors' formulation", over_logits(authors_ihl)),
    ]


def measure(candidates: list[Candidate], device: torch.device) -> None:
    """Interleaved rounds, after one call of each to warm up and one to find its peak memory."""
    time = timer(device)
    for candidate in candidates:
        candidate.run()
        candidate.peak_mib = peak_memory(candidate.run, device) / MIB
    for _ in range(ROUNDS):
        for candidate in candidates:
            candidate.times_ms.append(time(candidate.run))


def show_measurements(console: Console, title: str, candidates: list[Candidate]) -> None:
    table = Table(title=title)
    table.add_column("")
    for heading in ("ms", "times ours", "peak extra MiB"):
        table.add_column(heading, justify="right")
    for candidate in candidates:
        ratio = candidate.median_ms / candidates[0].median_ms
        table.add_row(candidate.name, f"{candidate.median_ms:.1f}", f"{ratio:.2f}", f"{candidate.peak_mib:.0f}")
    console.print(table)


def plot(measured: dict[str, list[Candidate]], hardware: str, out: Path) -> None:
    """Time and peak memory of every workload's candidates, as bars."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(len(measured), 2, figsize=(12, 2.6 * len(measured)), squeeze=False)
    for (title, candidates), (time_axis, memory_axis) in zip(measured.items(), axes, strict=True):
        names = [c.name for c in candidates]
        colours = ["#1b6ca8" if name.startswith("fused") else "#d98c3f" for name in names]
        for axis, values, unit in (
            (time_axis, [c.median_ms for c in candidates], "ms"),
            (memory_axis, [c.peak_mib for c in candidates], "MiB beyond the inputs, at the peak"),
        ):
            bars = axis.barh(names, values, color=colours)
            axis.bar_label(bars, fmt=" %.0f")
            axis.invert_yaxis()
            axis.margins(x=0.15)
            axis.set_xlabel(unit)
        time_axis.set_title(title, loc="left", fontsize=10)
    figure.suptitle(f"{hardware}, torch {torch.__version__}")
    figure.tight_layout()
    figure.savefig(out, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("demo.png"), help="where to write the figure")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    console = Console()
    show_one_row(console)
    show_memorised_row(console)
    measured = {
        f"Loss and gradient from logits, {ROWS} x {VOCABULARY} float32": from_logits(device),
        f"From hidden states, {ROWS} x {HIDDEN}, vocabulary {VOCABULARY}, float32": from_hidden_states(device),
    }
    for title, candidates in measured.items():
        measure(candidates, device)
        show_measurements(console, title, candidates)
    hardware = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    plot(measured, hardware, arguments.out)
    print(f"figure written to {arguments.out}")


if __name__ == "__main__":
    main()
