"""The leading eigenspace of M = A A^T by a block Krylov iteration, with an estimate of the energy it still misses.

The space is span{X, M X, M^2 X, ...} for a Gaussian block X. Its rows stay orthonormal by projecting every new block
twice against all earlier ones, so the matrix of M in it is read off the projection's own coefficients. Vectors are
rows: a block is (block, size), the layout that both the products with A and LAPACK's QR want.

The energy of a space is the sum of the `rank` largest eigenvalues of M in it (Ritz values). It grows with every step
towards the sum over M itself, which is not known. Two estimates of the difference, each blind where the other sees:

- The last gain, continued geometrically. It is too small in a cluster of nearly equal eigenvalues, which the space
  first finds as a whole, with quickly shrinking gains, and only later takes apart.
- What the Ritz vectors' residuals R leave open. In a basis that begins with those vectors, M is [T, R^T; R, N]. Where N
  has no larger eigenvalue than the least of T, t, the sum of the largest is greatest for N = t I, and is then that of a
  matrix twice as large as T. (For equal Ritz values that is the bound of Ky Fan, T + ||R||_*; where they are apart, the
  coupling adds less.) It is too small where an eigenvector has not been met, so that N has a larger eigenvalue. (R^2 /
  gap would be smaller, but in a cluster larger than the block the gap to the next Ritz value is not the spectrum's.)

Over random flat, clustered and power-law spectra the first alone stopped too early in 1% of runs, by factors up to 4;
the larger of the two in none. A block at least as wide as the rank belongs to this: a narrower one sees only part of a
repeated eigenvalue, and stops gaining, with small residuals, without having converged. One exactly as wide as such a
cluster overlaps with it in a square Gaussian matrix, which is nearly singular now and then: the space then lacks one
direction of the cluster for many steps, and neither estimate sees it. `widest_cluster` tells where that may have been.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# Gains before the fourth step still belong to the start block rather than to the spectrum.
MIN_STEPS = 4
_SAFETY = 3.0
_MIN_RATIO, _MAX_RATIO = 0.4, 0.9
# Gains that come down to what may be missing in a step, most often.
_NEAR = 1.5
# Eigenvalues that are closer, relative to each other, make a cluster.
_CLUSTERED = 3e-3
# Share of a row that lies outside the span of those before it, below which a Gram matrix in float64 loses too much.
_DEPENDENT = 1e-4


class BlockKrylov:
    """The space, grown a block at a time. `apply` maps rows (block, size) to rows @ M."""

    def __init__(self, apply: Callable[[Tensor], Tensor], start: Tensor, rank: int, generator: torch.Generator):
        self.apply, self.rank = apply, rank
        self.block, self.size = start.shape
        self.basis = start.new_empty(0, self.size)  # rows beyond `dimension` are room to grow
        self.projected = start.new_empty(0, 0, dtype=torch.float64, device="cpu")  # M in the basis
        self.dimension = 0
        self.energies: list[float] = []
        self._is_near = False
        self._next = _orthonormal(start, _gram(start))
        noise = start.new_empty(start.shape).uniform_(-1, 1, generator=generator)
        self._noise = noise * (torch.finfo(start.dtype).eps / self.size**0.5)

    def step(self) -> None:
        """Take in the next block. Synchronises: the small eigenproblem is solved on the host."""
        old, new = self.dimension, self.dimension + self.block
        if new > len(self.basis):
            self.basis = torch.cat([self.basis, self.basis.new_empty(max(8 * self.block, old), self.size)])
        self.basis[old:new] = self._next
        self.dimension = new
        coefficients, outside = self._multiply()
        self._extend_projected(coefficients.to("cpu", torch.float64))
        self._outside = outside.cpu()
        # Eigenvectors cost twice as much as the values alone, so they are formed only where they may be asked for.
        if self._is_near:
            values, self._vectors = torch.linalg.eigh(self.projected)
        else:
            values, self._vectors = torch.linalg.eigvalsh(self.projected), None
        self._values = values[-self.rank :]
        self.energies.append(float(self._values.sum()))

    def leading(self, missing: float) -> Tensor | None:
        """The (rank, size) orthonormal rows that hold the most energy, in decreasing order.

        None where further steps might add more energy than ``missing``, by the larger of two estimates that are meant
        to err upwards.
        """
        gains = continued_gains(self.energies)
        self._is_near = gains < _NEAR * missing
        if gains > missing:
            return None
        if self._vectors is None:
            self._vectors = torch.linalg.eigh(self.projected)[1]
        vectors = self._vectors[:, -self.rank :]
        last = vectors[-self.block :]
        if coupled_gain(self._values, last.T @ self._outside @ last) > missing:
            return None
        return vectors.flip(1).T.to(self.basis) @ self.basis[: self.dimension]

    def widest_cluster(self) -> int:
        """How many of the ``rank`` largest Ritz values lie together, those that are nothing but rounding left out."""
        values = self._values[self._values > 1e-6 * self._values[-1]]
        ends = torch.searchsorted(values, values * (1 + _CLUSTERED), right=True)
        return int((ends - torch.arange(len(values), device=ends.device)).max()) if len(values) else 0

    def _multiply(self) -> tuple[Tensor, Tensor]:
        """Set the next block from M times the newest, and return the coefficients of the part of it that lies in the
        basis, (block, dimension), with the Gram matrix of the part outside, (block, block)."""
        image = self.apply(self._next)
        basis = self.basis[: self.dimension]
        coefficients = image @ basis.T
        # Noise as large as the rounding errors of `image` gives generic directions where the space is exhausted, and
        # what is left of the rows may already be in the basis. The same numbers in other columns do as well as new
        # ones.
        height = torch.linalg.vector_norm(image, dim=1, keepdim=True) + torch.finfo(image.dtype).eps
        rows = torch.addcmul(image, self._noise.roll(self.dimension, dims=1), height)
        rows = torch.addmm(rows, coefficients, basis, alpha=-1)
        outside = _gram(rows)
        rows = _orthonormal(rows, outside)
        rows = torch.addmm(rows, rows @ basis.T, basis, alpha=-1)
        self._next = _orthonormal(rows, _gram(rows))
        return coefficients, outside

    def _extend_projected(self, coefficients: Tensor) -> None:
        grown = coefficients.new_empty(self.dimension, self.dimension)
        old = self.dimension - self.block
        grown[:old, :old] = self.projected
        grown[old:] = coefficients
        grown[:old, old:] = coefficients[:, :old].T
        self.projected = grown


def continued_gains(energies: Sequence[float]) -> float:
    """What the gains still add up to if they go on shrinking at the slower of their two last ratios."""
    if len(energies) < MIN_STEPS:
        return float("inf")
    first, second, third = (max(b - a, 0.0) for a, b in zip(energies[-4:-1], energies[-3:], strict=True))
    ratio = max(_ratio(second, first), _ratio(third, second))
    ratio = min(max(ratio, _MIN_RATIO), _MAX_RATIO)
    return _SAFETY * third * ratio / (1 - ratio)


def coupled_gain(values: Tensor, coupling: Tensor) -> float:
    """By how much the sum of the r largest eigenvalues of [T, R^T; R, t I] exceeds the trace of T = diag(values), where
    t is the least of the (r,) values and ``coupling`` is R^T R."""
    excess = torch.diag(values - values.min())
    squares, directions = torch.linalg.eigh(coupling)
    r = squares.clamp(min=0).sqrt()[:, None] * directions.T
    whole = torch.cat([torch.cat([excess, r.T], dim=1), torch.cat([r, torch.zeros_like(r)], dim=1)])
    return float(torch.linalg.eigvalsh(whole)[-len(values) :].sum() - excess.trace())


def _ratio(later: float, earlier: float) -> float:
    return later / earlier if earlier > 0 else float(later > 0)


def _gram(rows: Tensor) -> Tensor:
    double = rows.double()
    return double @ double.T


def _orthonormal(rows: Tensor, gram: Tensor) -> Tensor:
    """An orthonormal basis of the rows' span, from the rows and their Gram matrix in float64.

    By its Cholesky factor, or, where the rows nearly depend on each other, by QR, which takes several times as long.
    """
    factor, failed = torch.linalg.cholesky_ex(gram)
    if bool((failed > 0) | (factor.diagonal() < _DEPENDENT * gram.diagonal().sqrt()).any()):
        return torch.linalg.qr(rows.T)[0].T
    identity = torch.eye(len(rows), dtype=gram.dtype, device=gram.device)
    return torch.linalg.solve_triangular(factor, identity, upper=False).to(rows) @ rows
