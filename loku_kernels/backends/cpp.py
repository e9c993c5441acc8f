"""The C++ kernels of ``csrc/`` on CPU tensors: float32, bfloat16 and float16, at any instruction set of this processor.

Loading is lazy, and a library that is missing or does not load is a reason to report, not an error.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.machinery import PathFinder
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from loku_kernels import memory, processor
from loku_kernels.backends import formulas
from loku_kernels.backends.weights import RowWeights

# In the order of `InstructionSet` in csrc/cpu.h, the best last.
_INSTRUCTION_SETS = ("portable", "avx2", "avx512", "avx512bf16")


class GramTiles(NamedTuple):
    """A matrix cut into tiles, whose rows or columns have adjacent elements."""

    tiles: Tensor
    by_rows: bool


def missing_reason() -> str | None:
    """Why the kernels cannot be used here, or None where they can."""
    return _load()


@functools.cache
def instruction_sets() -> tuple[str, ...]:
    """What this processor can run, the best last; empty where the kernels are not built."""
    if _load() is not None:
        return ()
    supports = torch.ops.loku_kernels_cpp.supports
    return tuple(name for number, name in enumerate(_INSTRUCTION_SETS) if supports(number))


@dataclass(frozen=True)
class CppBackend:
    """The operations of ``reference`` at one instruction set: the best of this processor unless named.

    Memory: one row of float32 per thread beside the outputs.

    Raises:
        ValueError: the instruction set is unknown or this processor lacks it; or the kernels are not built.
    """

    instruction_set: str | None = None
    _number: int = field(init=False, repr=False)
    _is_chosen: bool = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        usable = instruction_sets()
        if not usable:
            raise ValueError(f"the C++ kernels cannot be used: {missing_reason()}")
        object.__setattr__(self, "_is_chosen", self.instruction_set is None)
        name = usable[-1] if self.instruction_set is None else self.instruction_set
        if name not in usable:
            raise ValueError(f"instruction_set must be one of {', '.join(usable)} on this processor, but is {name!r}")
        object.__setattr__(self, "instruction_set", name)
        object.__setattr__(self, "_number", _INSTRUCTION_SETS.index(name))

    def row_losses(
        self,
        logits: Tensor,
        labels: Tensor,
        weights: RowWeights,
        *,
        ignore_index: int,
        scale: float,
        softcap: float,
    ) -> tuple[Tensor, Tensor]:
        """As ``reference.row_losses``. Reads every row once."""
        kernel = torch.ops.loku_kernels_cpp.row_losses
        return self._sweep(kernel, logits, labels, weights, ignore_index, scale, softcap)

    def row_gradient(
        self,
        logits: Tensor,
        labels: Tensor,
        index: Tensor,
        coefficients: Tensor,
        upstream: Tensor,
        out: Tensor,
        *,
        ignore_index: int,
        scale: float,
        softcap: float,
    ) -> None:
        """As ``reference.row_gradient``. Reads and writes every row once."""
        torch.ops.loku_kernels_cpp.row_gradient(
            logits, labels, index, coefficients, upstream, out, ignore_index, scale, softcap, self._number
        )

    def row_losses_and_gradient_(
        self,
        logits: Tensor,
        labels: Tensor,
        weights: RowWeights,
        *,
        ignore_index: int,
        scale: float,
        softcap: float,
    ) -> tuple[Tensor, Tensor]:
        """As ``reference.row_losses_and_gradient_``. Reads and writes every row once."""
        kernel = torch.ops.loku_kernels_cpp.row_losses_and_gradient_
        return self._sweep(kernel, logits, labels, weights, ignore_index, scale, softcap)

    def _sweep(
        self, kernel: Callable[..., None], logits: Tensor, labels: Tensor, weights: RowWeights, *transform: float
    ) -> tuple[Tensor, Tensor]:
        """Call a kernel that fills the table and the index."""
        rows = torch.empty((formulas.ROW_FIELDS, labels.shape[0]), dtype=torch.float32, device=labels.device)
        index = torch.empty_like(labels)
        kernel(logits, labels, *weights, rows, index, *transform, self._number)
        return rows, index

    def reduce_losses(self, losses: Tensor, labels: Tensor, *, ignore_index: int, mean: bool) -> tuple[Tensor, Tensor]:
        """As ``reference.reduce_losses``; summed in float64."""
        value, factor = losses.new_empty(()), losses.new_empty(())
        torch.ops.loku_kernels_cpp.reduce_losses(losses, labels, value, factor, ignore_index, mean)
        return value, factor

    def fisher_accumulate(
        self, fisher: Tensor, inputs: Tensor, grad_outputs: Tensor, offsets: Tensor, weights: Tensor
    ) -> None:
        """fisher (out, in) += sum over s of weights[s] * (grad_outputs[s's tokens]^T inputs[s's tokens])^2.

        Args:
            fisher: float32, rows of adjacent elements.
            inputs, grad_outputs: (tokens, in) and (tokens, out), of one dtype, rows of adjacent elements.
            offsets: (S + 1,) int64, contiguous; clamped to [0, tokens].
            weights: (S,) float32, contiguous.

        Memory: at most 1.7 MiB per thread, whatever the shapes.
        """
        number = self._number
        if self._is_chosen and inputs.dtype == torch.bfloat16 and processor.has_slow_bfloat16():
            number = _INSTRUCTION_SETS.index("avx512")  # widens
        torch.ops.loku_kernels_cpp.fisher_accumulate_(fisher, inputs, grad_outputs, offsets, weights, number)

    def fisher_accumulate_grad(self, fisher: Tensor, grad: Tensor, scale: float) -> None:
        """fisher += scale * grad^2 in float32. Both contiguous, of one shape; no memory beside them."""
        torch.ops.loku_kernels_cpp.fisher_accumulate_grad_(fisher, grad, scale, self._number)

    def gram_tiles(self, matrix: Tensor, row_weight: Tensor, of_transpose: bool) -> GramTiles:
        """A = diag(row_weight) @ matrix, or its transpose, laid out for ``gram_product``.

        Args:
            matrix: float32 (rows, columns); fastest with adjacent elements in rows or in columns.
            row_weight: float32 (rows,), contiguous.

        Memory: the tiles, in memory that is kept for the next (``empty_cache``).
        """
        matrix = matrix if 1 in matrix.stride() else matrix.contiguous()
        scales = row_weight.as_strided(matrix.shape, (1, 0))
        matrix, scales = (matrix.T, scales.T) if of_transpose else (matrix, scales)
        side = torch.ops.loku_kernels_cpp.gram_side()
        panels, across = (-(-size // side) for size in matrix.shape)
        tiles = memory.empty((panels, across, side, side), torch.float32, matrix.device)
        torch.ops.loku_kernels_cpp.gram_pack_(tiles, matrix, scales, self._number)
        return GramTiles(tiles, matrix.stride(1) == 1)

    def gram_product(self, tiled: GramTiles, x: Tensor) -> Tensor:
        """A^T A x, (columns, width), reading A once.

        Args:
            tiled: A, from ``gram_tiles``.
            x: float32 (columns, width), contiguous; width a multiple of 16.

        Memory: width x columns floats per thread. The order of the sums depends on the number of threads.
        """
        panels, across, side, _ = tiled.tiles.shape
        sums = x.new_zeros(min(torch.get_num_threads(), panels), across * side, x.shape[1])
        torch.ops.loku_kernels_cpp.gram_product_(sums, *tiled, x, self._number)
        return sums.sum(0)[: len(x)]


@functools.cache
def _load() -> str | None:
    """Load the library once; the reason if that fails."""
    package = Path(__file__).parents[1]
    spec = PathFinder.find_spec("_C", [str(package)])
    if spec is None or spec.origin is None:
        return "the C++ kernels are not built (reinstall with a C++ compiler at hand)"
    try:
        torch.ops.load_library(spec.origin)
    except (ImportError, OSError) as error:
        return f"the C++ kernels do not load with torch {torch.__version__}: {error}"
    return None
