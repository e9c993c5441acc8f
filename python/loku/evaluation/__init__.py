"""Has the model forgotten, and what does it still know?

ma = memorization_accuracy(model, input_ids)                        # per sequence
el = extraction_likelihood(model, input_ids, n=10)                  # per sequence
log = evaluate_tofu(model, tokenizer, "phi", data_dir=folder)       # the published format
summary = aggregate_tofu(log, retain_log)                           # model_utility, forget_quality, and the parts
perplexity(model, examples)
"""

from loku.evaluation.extraction import extraction_likelihood
from loku.evaluation.generation import generate_greedily, rouge_recall
from loku.evaluation.harness import NINE_TASKS, lm_eval_tasks
from loku.evaluation.losses import SequenceLosses, sequence_losses
from loku.evaluation.perplexity import perplexity
from loku.evaluation.tdec import TdecThresholds, evaluate_tdec, memorization_accuracy, tdec_thresholds
from loku.evaluation.tofu import evaluate_tofu
from loku.evaluation.tofu_aggregate import aggregate_tofu
from loku.evaluation.tofu_log import TofuLog, read_log, write_log

__all__ = [
    "NINE_TASKS",
    "SequenceLosses",
    "TdecThresholds",
    "TofuLog",
    "aggregate_tofu",
    "evaluate_tdec",
    "evaluate_tofu",
    "extraction_likelihood",
    "generate_greedily",
    "lm_eval_tasks",
    "memorization_accuracy",
    "perplexity",
    "read_log",
    "rouge_recall",
    "sequence_losses",
    "tdec_thresholds",
    "write_log",
]
