"""Classification tasks of lm-evaluation-harness, an optional extra."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn
from transformers import PreTrainedTokenizerBase

from loku.inference import evaluation_mode

NINE_TASKS = (
    "arc_challenge",
    "arc_easy",
    "copa",
    "hellaswag",
    "lambada_openai",
    "mathqa",
    "piqa",
    "pubmedqa",
    "winogrande",
)
"""What LoKU's experiments on the extraction challenge report (arXiv 2408.06621, section 4.1)."""


def lm_eval_tasks(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str] = NINE_TASKS,
    *,
    batch_size: int = 32,
    limit: int | None = None,
    seed: int = 0,
) -> dict[str, float]:
    """Task -> accuracy (zero-shot), as lm-evaluation-harness measures it on its own data, which it downloads.

    Args:
        limit: samples a task; None for all.
        seed: of the harness's random numbers, where a task draws any.

    Raises:
        ImportError: lm-eval is not installed.
    """
    simple_evaluate, HFLM = import_lm_eval()
    with evaluation_mode(model):
        wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        seeds = {f"{of}random_seed": seed for of in ("", "numpy_", "torch_", "fewshot_")}
        results = simple_evaluate(wrapped, tasks=list(tasks), num_fewshot=0, limit=limit, **seeds)["results"]
    return {task: results[task]["acc,none"] for task in tasks}


def import_lm_eval() -> tuple[Callable, type]:
    """``simple_evaluate`` and ``HFLM``. Raises ImportError, which says how to install them, where one is missing."""
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise ImportError("lm_eval_tasks needs lm-eval: pip install 'loku-kernels[lm-eval]'") from error
    return simple_evaluate, HFLM
