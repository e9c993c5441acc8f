"""Run folders as the commands write them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

TDEC_LOG = (
    {"step": 0, "epoch": 0.0, "seconds": 0.1, "eval_el_10": 0.9, "eval_ma": 0.95, "eval_perplexity": 30.0},
    {"step": 1, "epoch": 0.5, "seconds": 1.0, "loss": 1.9, "grad_norm": 2.0, "learning_rate": 1e-4},
    {"step": 2, "epoch": 1.0, "seconds": 2.0, "eval_el_10": 0.2, "eval_ma": 0.5, "eval_perplexity": 31.0},
    {"step": 4, "epoch": 2.0, "seconds": 4.0, "eval_el_10": 0.05, "eval_ma": 0.3, "eval_perplexity": 33.0},
)
TOFU_LOG = (
    {"step": 0, "eval_model_utility": 0.5, "eval_forget_quality": 1e-16, "eval_forget_rouge": 0.9},
    {"step": 5, "eval_model_utility": 0.48, "eval_forget_quality": 1e-4, "eval_forget_rouge": 0.5},
    {"step": 10, "eval_model_utility": 0.47, "eval_forget_quality": 1e-2, "eval_forget_rouge": 0.4},
)
VERSIONS = {"python": "3.11", "torch": "2.13.0", "hardware": "a processor", "commit": "abcdef0"}


def make_run(
    folder: Path,
    *,
    log: Sequence[dict[str, Any]] = TDEC_LOG,
    results: dict[str, Any] | None = None,
    **config: Any,
) -> Path:
    """A run of LoKU, with ``config`` for arguments that differ; without results, one that was killed."""
    folder.mkdir(parents=True)
    arguments = {"method": "loku", "model": "m", "forget": "f", "retain": "r", "rank": 16, "seed": 0, "alpha": 32}
    arguments |= {"learning_rate": 2e-4, "output_dir": str(folder)} | config
    (folder / "config.yaml").write_text(yaml.safe_dump(arguments))
    (folder / "versions.json").write_text(json.dumps(VERSIONS))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log))
    if results is not None:
        (folder / "results.json").write_text(json.dumps(results))
    return folder


def tdec_results(el: float, perplexity: float, seconds: float = 10.0) -> dict[str, Any]:
    return {
        "before": {"el_10": 0.9, "ma": 0.95, "perplexity": 30.0},
        "after": {"el_10": el, "ma": 0.3, "perplexity": perplexity},
        "thresholds": {"el_10": 0.06, "ma": 0.31},
        "seconds": seconds,
        "peak_memory_mib": 1500.0,
    }
