"""The ``torch.library`` operators: schema, fake implementation and gradient of each, on whichever backend serves."""

from loku_kernels.ops.linear import linear_target_statistics, linear_unlearning_loss
from loku_kernels.ops.logits import target_statistics, unlearning_loss

__all__ = ["linear_target_statistics", "linear_unlearning_loss", "target_statistics", "unlearning_loss"]
