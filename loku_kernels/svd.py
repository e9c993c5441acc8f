"""The best rank-r approximation of diag(row_weight) @ weight, to a stated accuracy (FILA's factors).

Written A = D W (out x in). Whatever finds the leading right vectors V (in x r), the rest is the same: Y = D (W V),
whose rows carry their weight as a factor and so keep their relative accuracy however small it is; the SVD of Y in
float64; and ||A - Y V^T||, measured. A step of the Krylov iteration reads W twice or, where there is a kernel for it
(float32 on CPUs), a copy of A once.
"""

from __future__ import annotations

import copy
import functools
import itertools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from loku_kernels import gemm
from loku_kernels._krylov import BlockKrylov
from loku_kernels._validation import check_integer
from loku_kernels.backends import select

# Share of what rank 0's residual exceeds the optimum's by, which the returned residual may exceed it by.
LOST_SHARE = 0.01
# In units of the rounding error of ||D W||: below this a residual cannot be told from zero.
_FLOOR = 8
# Row norms between these come from squares that neither overflow nor vanish in float32.
_SQUARES_ARE_SAFE = (1e-12, 1e18)
# Beyond this a row is so short beside the longest that float32 has lost its digits, or its weight has no room.
_LARGEST_ROW_WEIGHT = 1e30
_CHUNK_ELEMENTS = 1 << 20
_BLOCK_UNIT = 16  # vectors: the products are fastest at multiples of it


class WeightedSVD(NamedTuple):
    """diag(row_weight) @ weight, nearly U @ diag(S) @ Vh."""

    U: Tensor  # (..., out, r), orthonormal columns
    S: Tensor  # (..., r), decreasing, at least 0
    Vh: Tensor  # (..., r, in), orthonormal rows
    residual: Tensor  # (...), ||D W - U S Vh||_F / ||D W||_F as measured


@torch.no_grad()
def weighted_svd(
    weight: Tensor,
    row_weight: Tensor,
    rank: int,
    *,
    rtol: float = 1e-4,
    generator: torch.Generator | None = None,
) -> WeightedSVD:
    """The best rank-``rank`` approximation U diag(S) Vh of A = diag(row_weight) @ weight in the Frobenius norm.

    The residual ||A - U diag(S) Vh|| exceeds that of the optimum by at most ``rtol`` of it, and by at most 1% of what
    rank 0's residual, ||A||, exceeds it by; both up to rounding, 8 epsilons of ||A|| in quadrature (40 for a float64
    weight). The optimum is not known, so this rests on an estimate of what is missing, which erred on the safe side on
    the spectra studied (flat, clustered, power-law, low rank with noise). Where it does not come down in time, the
    decomposition is exact. Autocast is off inside.

    Args:
        weight: (..., out, in), floating point. Leading dimensions are a batch, worked through one matrix at a time.
        row_weight: (..., out), finite and at least 0, on the device of ``weight``.
        rank: from 1 to min(out, in).
        rtol: positive.
        generator: gives the seed of the random start block, one draw a call. Without one the seed is fixed. Equal
            seeds give equal results on the same machine.

    Returns:
        U (..., out, rank), S (..., rank), Vh (..., rank, in) and the measured relative residual (...), in float64 for a
        float64 weight and in float32 otherwise. The entry of largest magnitude in each row of Vh is positive. Rows of
        U whose weight is 0 are exactly 0, and the others accurate relative to their own size. Where A has a rank below
        ``rank``, the surplus entries of S are exactly 0 and their vectors complete the orthonormal sets; only if fewer
        than ``rank`` rows of A are other than 0 does that need rows of weight 0.

    Raises:
        TypeError: weight or row_weight is not a floating point tensor.
        ValueError: a shape, the rank or rtol does not fit; row_weight has a negative entry; an entry is not finite; the
            largest singular value is outside the range of the factors' dtype.

    Besides a float32 copy of 16-bit weights it holds 5 to 15 blocks of ``rank`` vectors of length min(out, in), and on
    a CPU a float32 copy of A, in memory that is kept for the next (``empty_cache``). Where the relative residual is
    below about 0.03, float32 cannot tell whether the optimum is reached, and the iteration runs again on a float64
    copy; small matrices and high ranks take such a copy and the Gram matrix of one side. It synchronises with the
    device to check its input and at every step to test for convergence.
    """
    _check(weight, row_weight, rank, rtol)
    device = weight.device
    seed = 0 if generator is None else int(torch.randint(2**62, (), generator=generator, device=generator.device))
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    batch, (rows, columns) = weight.shape[:-2], weight.shape[-2:]
    U = torch.zeros(*batch, rows, rank, dtype=dtype, device=device)
    S = torch.zeros(*batch, rank, dtype=dtype, device=device)
    Vh = torch.zeros(*batch, rank, columns, dtype=dtype, device=device)
    residual = torch.zeros(batch, dtype=dtype, device=device)
    with gemm.without_autocast(device):
        for i in itertools.product(*map(range, batch)):
            matrix = _Weighted.of(weight[i].to(dtype), row_weight[i])
            U[i], S[i], Vh[i], residual[i] = _factorise(matrix, rank, rtol, torch.Generator(device).manual_seed(seed))
    return WeightedSVD(U, S, Vh, residual)


def krylov_block(rows: int, columns: int, rank: int) -> int | None:
    """Width of the Krylov block, or None where the exact decomposition by the Gram matrix is as fast.

    Milliseconds on a flat and a power-law spectrum, and of the exact decomposition (2 cores, float32):
    512 x 512: rank 16 10, 4, 27; rank 32 20, 11, 28; rank 64 42, 41, 30.
    1024 x 4096: rank 32 77, 33, 221; rank 64 310, 76, 224.
    A flat spectrum takes 12 to 16 steps, and a basis of most of the size gains nothing.
    """
    block = -(-rank // _BLOCK_UNIT) * _BLOCK_UNIT
    return block if 24 * block <= min(rows, columns) else None


class _Weighted:
    """A = diag(d) @ W by its products with thin blocks of rows, scaled so that its longest row has norm 1 (or A is 0).

    `dtype` is that of the factors, `weight.dtype` the one worked in.
    """

    def __init__(self, weight: Tensor, row_weight: Tensor, dtype: torch.dtype):
        self.dtype = dtype
        lengths = torch.linalg.vector_norm(weight, dim=1)
        self.weight, self.scale = weight, 1.0
        if not _SQUARES_ARE_SAFE[0] < float(lengths.max()) < _SQUARES_ARE_SAFE[1]:
            self.scale = _largest_magnitude(weight) or 1.0
            self.weight = weight / self.scale
            lengths = torch.linalg.vector_norm(self.weight, dim=1)
        if float(lengths.min()) < _SQUARES_ARE_SAFE[0]:  # rows that are short beside the longest may matter by weight
            lengths = torch.linalg.vector_norm(self.weight, dim=1, dtype=torch.float64)
        lengths = lengths.double() * row_weight.double()
        longest = float(lengths.max()) or 1.0
        if not longest < float("inf"):
            raise ValueError("row_weight times the norm of a row of weight is beyond float64: scale row_weight")
        self.scale *= longest
        self.row_weight = torch.where(lengths > 0, row_weight.double() / longest, 0.0).to(weight.dtype)
        self.norm = float(torch.linalg.vector_norm(lengths / longest))

    @classmethod
    def of(cls, weight: Tensor, row_weight: Tensor) -> _Weighted:
        """Worked in the dtype of ``weight``, or in float64 where that cannot hold rows that matter."""
        a = cls(weight, row_weight, weight.dtype)
        if weight.dtype == torch.float32 and float(a.row_weight.max()) > _LARGEST_ROW_WEIGHT:
            return cls(weight.double(), row_weight, weight.dtype)
        return a

    def left(self, rows: Tensor) -> Tensor:
        """rows (b, out) @ A -> (b, in)."""
        # As inputs @ weight^T: mm takes up to twice as long for so few rows on an AMD with AVX2.
        return gemm.linear(rows * self.row_weight, self.weight.T)

    def right(self, rows: Tensor) -> Tensor:
        """rows (b, in) @ A^T -> (b, out)."""
        return gemm.mm(self.weight, rows.T).T * self.row_weight

    def gram(self, rows: Tensor) -> Tensor:
        """rows (b, size) @ A A^T where A is wide, else rows @ A^T A."""
        backend = select(self.weight)
        if hasattr(backend, "gram_product"):
            return backend.gram_product(self._tiles, rows.T.contiguous()).T
        return self.right(self.left(rows)) if self.is_wide else self.left(self.right(rows))

    @functools.cached_property
    def _tiles(self) -> Any:
        return select(self.weight).gram_tiles(self.weight, self.row_weight, self.is_wide)

    @property
    def is_wide(self) -> bool:
        return self.weight.shape[0] <= self.weight.shape[1]

    def double(self) -> _Weighted:
        """The same, worked in float64."""
        other = copy.copy(self)
        other.__dict__.pop("_tiles", None)
        other.weight, other.row_weight = self.weight.double(), self.row_weight.double()
        return other

    def distance(self, y: Tensor, vh: Tensor) -> float:
        """||A - y (out, r) @ vh (r, in)||_F, by pieces that stay in cache."""
        height = max(16, _CHUNK_ELEMENTS // vh.shape[1])
        piece = self.weight.new_empty(min(height, len(y)), vh.shape[1])
        lengths = torch.empty_like(self.row_weight)  # by rows: one float32 sum over a whole piece would be 1e-5 off
        pieces = zip(*(x.split(height) for x in (self.weight, self.row_weight, y, lengths)), strict=True)
        for w, d, y_, lengths_ in pieces:
            difference = torch.mul(w, d[:, None], out=piece[: len(w)]).addmm_(y_, vh, alpha=-1)
            torch.linalg.vector_norm(difference, dim=1, out=lengths_)
        return float(torch.linalg.vector_norm(lengths.double()))


def _largest_magnitude(weight: Tensor) -> float:
    largest = float(weight.abs().max())
    if not largest < float("inf"):
        raise ValueError("weight must be finite, got an infinite or NaN entry")
    return largest


def _factorise(
    a: _Weighted, rank: int, rtol: float, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor, float]:
    block = krylov_block(*a.weight.shape, rank)
    found = None if block is None or a.norm == 0 else _by_krylov(a, rank, rtol, block, generator)
    return found or _finish(a, _exact_rows(a, rank))


def _by_krylov(
    a: _Weighted, rank: int, rtol: float, block: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor, float] | None:
    """The factors, or None where the space has grown too large, or the residual too small, for iterating to help."""
    size = min(a.weight.shape)
    start = torch.randn(block, size, generator=generator, dtype=a.weight.dtype, device=a.weight.device)
    space = BlockKrylov(a.gram, start, rank, generator)
    # Products in this precision blur the energy by some of this: a decision must not rest on less.
    resolution = torch.finfo(a.weight.dtype).eps * a.norm**2
    while 4 * (space.dimension + block) <= 3 * size:
        space.step()
        remaining = max(a.norm**2 - space.energies[-1], 0.0)
        allowed = allowed_energy(remaining**0.5, a.norm, rtol, a.dtype)
        if allowed < resolution:
            return None if a.weight.dtype == torch.float64 else _by_krylov(a.double(), rank, rtol, block, generator)
        rows = space.leading(allowed)
        if rows is None:
            continue
        if space.widest_cluster() >= block - 1:
            return _by_krylov(a, rank, rtol, block + _BLOCK_UNIT, generator)
        return _finish(a, a.left(rows) if a.is_wide else rows)
    return None


def allowed_energy(residual: float, norm: float, rtol: float, dtype: torch.dtype) -> float:
    """By how much residual**2 may exceed the optimum's square under the accuracy that `weighted_svd` promises."""
    optimum = max(residual / (1 + rtol), (residual - LOST_SHARE * norm) / (1 - LOST_SHARE))
    floor = _FLOOR * torch.finfo(dtype).eps * norm
    return max((residual - optimum) * (residual + optimum), floor**2)


def _exact_rows(a: _Weighted, rank: int) -> Tensor:
    """Rows (rank, in) that span the leading right vectors. Squaring costs half the digits, which float32 never had."""
    dense = a.weight.double() * a.row_weight.double()[:, None]
    if a.dtype == torch.float64:
        return torch.linalg.svd(dense, full_matrices=False)[2][:rank]
    gram = dense @ dense.T if a.is_wide else dense.T @ dense
    leading = torch.linalg.eigh(gram)[1][:, -rank:].flip(1).T
    return leading @ dense if a.is_wide else leading


def _finish(a: _Weighted, rows: Tensor) -> tuple[Tensor, Tensor, Tensor, float]:
    """The factors of A V V^T, V an orthonormal basis of the given rows (r, in), and its relative distance from A."""
    rank = len(rows)
    vh = torch.linalg.qr(rows.T.double())[0].T
    y = a.right(vh.to(a.weight.dtype)).T.double()
    # Rows without weight take no part, except as many as are needed to complete the columns of U.
    part = torch.argsort((a.row_weight == 0).int(), stable=True)[: max(rank, int((a.row_weight > 0).sum()))]
    u_part, s, rotation = torch.linalg.svd(y[part], full_matrices=False)
    vh = rotation @ vh
    peak = vh.gather(1, vh.abs().argmax(dim=1, keepdim=True))
    sign = torch.where(peak < 0, -1.0, 1.0).to(vh)
    u = torch.zeros_like(y).index_copy(0, part, u_part) * sign.T
    s = torch.where(s > torch.finfo(a.dtype).eps * s[0], s, 0.0)
    u, s, vh = u.to(a.dtype), s.to(a.dtype), (vh * sign).to(a.dtype)
    largest, range_of = float(s[0]) * a.scale, torch.finfo(a.dtype)
    if a.norm > 0 and not range_of.tiny <= largest <= range_of.max:
        raise ValueError(f"the largest singular value, {largest:g}, is outside {a.dtype}: scale weight or row_weight")
    distance = a.distance((u * s).to(a.weight.dtype), vh.to(a.weight.dtype))
    return u, s * a.scale, vh, distance / a.norm if a.norm > 0 else 0.0


def _check(weight: Tensor, row_weight: Tensor, rank: int, rtol: float) -> None:
    for name, tensor in (("weight", weight), ("row_weight", row_weight)):
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            raise TypeError(f"{name} must be a floating point tensor, got {getattr(tensor, 'dtype', type(tensor))}")
    if weight.dim() < 2:
        raise ValueError(f"weight must be (..., out, in), got the shape {tuple(weight.shape)}")
    if row_weight.shape != weight.shape[:-1]:
        raise ValueError(
            f"row_weight must have the shape {tuple(weight.shape[:-1])} of weight's rows, got {tuple(row_weight.shape)}"
        )
    if row_weight.device != weight.device:
        raise ValueError(f"row_weight must be on {weight.device} as weight is, got {row_weight.device}")
    check_integer("rank", rank)
    if not 1 <= rank <= min(weight.shape[-2:]):
        raise ValueError(f"rank must be from 1 to min(out, in) = {min(weight.shape[-2:])}, got {rank}")
    if not rtol > 0:
        raise ValueError(f"rtol must be positive, got {rtol}")
    if not bool((torch.isfinite(row_weight) & (row_weight >= 0)).all()):
        raise ValueError("row_weight must be finite and at least 0, got a negative, infinite or NaN entry")
