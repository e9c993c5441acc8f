"""Kernels for removing memorised text from language models.

The inverted hinge loss and the cross-entropy from logits or from hidden states, without ever holding a softmax; the
weighted truncated singular value decomposition that FILA starts adapters from.
"""

from loku_kernels._version import __version__
from loku_kernels.linear_losses import (
    fused_linear_cross_entropy,
    fused_linear_ihl,
    fused_linear_unlearning_loss,
    linear_target_statistics,
)
from loku_kernels.losses import fused_cross_entropy, fused_ihl, fused_unlearning_loss, target_statistics
from loku_kernels.memory import empty_cache
from loku_kernels.results import RowStatistics, TargetStatistics
from loku_kernels.weighted_svd import WeightedSVD, weighted_svd

__all__ = [
    "RowStatistics",
    "TargetStatistics",
    "WeightedSVD",
    "__version__",
    "empty_cache",
    "fused_cross_entropy",
    "fused_ihl",
    "fused_linear_cross_entropy",
    "fused_linear_ihl",
    "fused_linear_unlearning_loss",
    "fused_unlearning_loss",
    "linear_target_statistics",
    "target_statistics",
    "weighted_svd",
]
