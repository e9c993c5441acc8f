"""Training: the methods, and a trainer that runs them.

args = UnlearnConfig("run", method="ihl", num_train_epochs=5, learning_rate=1e-4, per_device_train_batch_size=8)
trainer = UnlearningTrainer(model, args, forget_dataset=forget, retain_dataset=retain)
trainer.train()
"""

from loku.training.callbacks import EvaluationCallback, JsonLinesCallback
from loku.training.checkpoints import checkpoint_fault, last_whole_checkpoint
from loku.training.config import UnlearnConfig
from loku.training.methods import METHODS, Loss, Method, Totals, get_method
from loku.training.scores import Scorer, Scores
from loku.training.trainer import UnlearningTrainer

__all__ = [
    "METHODS",
    "EvaluationCallback",
    "JsonLinesCallback",
    "Loss",
    "Method",
    "Scorer",
    "Scores",
    "Totals",
    "UnlearnConfig",
    "UnlearningTrainer",
    "checkpoint_fault",
    "get_method",
    "last_whole_checkpoint",
]
