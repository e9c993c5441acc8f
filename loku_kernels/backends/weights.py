"""What the two losses of every row are multiplied by, as the backends take it."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class RowWeights(NamedTuple):
    """Of IHL and of CE: a factor, times the row's entry of a tensor (N,) in the compute dtype where there is one."""

    ihl: Tensor | None
    ihl_factor: float
    ce: Tensor | None
    ce_factor: float

    def of(self, rows: slice | Tensor) -> RowWeights:
        """Those of the given rows."""
        ihl, ce = (None if weight is None else weight[rows] for weight in (self.ihl, self.ce))
        return self._replace(ihl=ihl, ce=ce)


NO_LOSS = RowWeights(None, 0.0, None, 0.0)
"""Where only the statistics are wanted."""
