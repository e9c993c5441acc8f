"""Bars of a result file: ``python -m bench.plot RESULT.json -o out.png``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLOURS = {"ours": "#1b6ca8", "limit": "#9aa5ad", "peer": "#d98c3f", "part": "#7fb069"}


def plot(results: dict, out: Path) -> None:
    """One panel a workload: median time of each candidate, on a logarithmic axis."""
    workloads: dict[str, list[dict]] = {}
    for entry in results["measurements"]:
        workloads.setdefault(entry["workload"], []).append(entry)
    columns = 3
    rows = -(-len(workloads) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(6.4 * columns, 2.6 * rows), squeeze=False)
    for axis, (workload, entries) in zip(axes.flat, workloads.items(), strict=False):
        entries = entries[::-1]
        times = [entry["median_ms"] for entry in entries]
        axis.barh([e["candidate"] for e in entries], times, color=[COLOURS[e["role"]] for e in entries])
        for position, milliseconds in enumerate(times):
            axis.annotate(f" {milliseconds:.3g}", (milliseconds, position), va="center", fontsize=8)
        axis.set_xscale("log")
        axis.set_xlim(right=max(times) * 3)
        axis.set_title(workload, fontsize=9)
        axis.tick_params(labelsize=8)
    for axis in axes.flat[len(workloads) :]:
        axis.set_visible(False)
    versions = results["versions"]
    figure.suptitle(
        f"median ms; {results['hardware']}, torch {versions['torch']}, commit {results['commit']}", fontsize=10
    )
    figure.tight_layout(rect=(0, 0, 1, 0.98))
    figure.savefig(out, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path)
    parser.add_argument("-o", "--out", type=Path, default=Path("bench.png"))
    arguments = parser.parse_args()
    try:
        results = json.loads(arguments.results.read_text())
    except (OSError, ValueError) as error:
        parser.error(f"{arguments.results} cannot be read: {error}")
    if not results.get("measurements"):
        parser.error(f"{arguments.results} has no measurements to plot")
    plot(results, arguments.out)


if __name__ == "__main__":
    main()
