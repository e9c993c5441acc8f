"""Kernels for removing memorised text from language models.

The inverted hinge loss and the cross-entropy from logits or from hidden states, without ever holding a softmax; the
diagonal Fisher information, without ever holding a sequence's gradient; the weighted truncated singular value
decomposition that FILA starts adapters from.
"""

from loku_kernels._version import __version__
from loku_kernels.fisher import fisher_accumulate, fisher_accumulate_grad
from loku_kernels.fisher_accumulator import FisherAccumulator
from loku_kernels.linear_losses import (
    fused_linear_cross_entropy,
    fused_linear_ihl,
    fused_linear_unlearning_loss,
    linear_target_statistics,
)
from loku_kernels.losses import fused_cross_entropy, fused_ihl, fused_unlearning_loss, target_statistics
from loku_kernels.memory import empty_cache
from loku_kernels.results import RowStatistics, TargetStatistics
from loku_kernels.svd import WeightedSVD, weighted_svd

__all__ = [
    "FisherAccumulator",
    "RowStatistics",
    "TargetStatistics",
    "WeightedSVD",
    "__version__",
    "empty_cache",
    "fisher_accumulate",
    "fisher_accumulate_grad",
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
