"""The kernels in Triton: NVIDIA GPUs, and any machine under ``TRITON_INTERPRET=1``, for the tests.

``reference`` and ``reference_fisher`` are the definition of the functions. None of them waits for the device or reads a
tensor on the host, so they can be captured in a CUDA graph.
"""

from loku_kernels.backends.triton.fisher import fisher_accumulate, fisher_accumulate_grad
from loku_kernels.backends.triton.fused import row_losses_and_gradient_
from loku_kernels.backends.triton.gradient import row_gradient
from loku_kernels.backends.triton.losses import row_losses
from loku_kernels.backends.triton.reduction import reduce_losses

__all__ = [
    "fisher_accumulate",
    "fisher_accumulate_grad",
    "reduce_losses",
    "row_gradient",
    "row_losses",
    "row_losses_and_gradient_",
]
