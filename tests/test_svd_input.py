"""weighted_svd refuses what it cannot decompose, and names it."""

from __future__ import annotations

import pytest
import torch

from loku_kernels.svd import weighted_svd


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"rank": 6}, ValueError, "rank must be from 1 to .* = 5, got 6"),
        ({"rank": 0}, ValueError, "rank"),
        ({"rtol": 0.0}, ValueError, "rtol"),
        ({"rtol": float("nan")}, ValueError, "rtol"),
        ({"weight": torch.ones(6)}, ValueError, "weight"),
        ({"weight": torch.ones(6, 5, dtype=torch.int64)}, TypeError, "weight"),
        ({"weight": [[1.0]]}, TypeError, "weight"),
        ({"weight": torch.full((6, 5), float("nan"))}, ValueError, "^weight must be finite"),
        ({"weight": torch.eye(6, 5) * float("inf")}, ValueError, "^weight must be finite"),
        (
            {"weight": torch.ones(6, 5) * 1e30, "row_weight": torch.ones(6) * 1e30},
            ValueError,
            "singular value.*outside",
        ),
        (
            {"weight": torch.ones(6, 5) / 1e30, "row_weight": torch.ones(6) / 1e30},
            ValueError,
            "singular value.*outside",
        ),
        (
            {"row_weight": torch.ones(6).double() * 1e300, "weight": torch.ones(6, 5) * 1e10},
            ValueError,
            "beyond float64",
        ),
        ({"row_weight": torch.ones(5)}, ValueError, r"row_weight must have the shape \(6,\)"),
        ({"row_weight": torch.ones(6, dtype=torch.int64)}, TypeError, "row_weight"),
        ({"row_weight": torch.ones(6, device="meta")}, ValueError, "row_weight"),
        ({"row_weight": torch.tensor([1, 1, 1, 1, 1, -1e-30])}, ValueError, "row_weight"),
        ({"row_weight": torch.tensor([1, 1, 1, 1, 1, float("nan")])}, ValueError, "row_weight"),
        ({"row_weight": torch.tensor([1, 1, 1, 1, 1, float("inf")])}, ValueError, "row_weight"),
    ],
)
def test_bad_input_is_named(change, error, words):
    arguments = {"weight": torch.ones(6, 5), "row_weight": torch.ones(6), "rank": 2, "rtol": 1e-4} | change
    weight, row_weight, rank = (arguments.pop(k) for k in ("weight", "row_weight", "rank"))
    with pytest.raises(error, match=words):
        weighted_svd(weight, row_weight, rank, **arguments)


def test_one_bad_row_in_a_weight_of_zero_is_still_refused():
    weight = torch.ones(6, 5)
    weight[2, 3] = float("nan")
    with pytest.raises(ValueError, match=r"^weight must be finite"):
        weighted_svd(weight, torch.zeros(6), 2)
