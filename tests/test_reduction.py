"""The sum and the mean of the rows' losses, as every backend forms them."""

from __future__ import annotations

import pytest
import torch

from loku_kernels.backends import select


@pytest.mark.parametrize("ignored", [0.0, 0.3, 1.0], ids=lambda share: f"{share:.0%} ignored")
@pytest.mark.parametrize("mean", [False, True], ids=["sum", "mean"])
@pytest.mark.parametrize("rows", [0, 1, 4096, 10_001])
def test_sum_and_mean(backend, device, rows, mean, ignored):
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 9, (rows,), generator=generator)
    labels[: round(ignored * rows)] = 7
    losses = torch.randn(rows, generator=generator).masked_fill(labels == 7, 0.0)
    value, factor = select(losses).reduce_losses(losses.to(device), labels.to(device), ignore_index=7, mean=mean)
    counted = max(1, int((labels != 7).sum())) if mean else 1
    assert value.shape == factor.shape == ()
    assert value.dtype == factor.dtype == torch.float32
    assert factor.item() == pytest.approx(1 / counted, rel=1e-6)
    exact = losses.double().sum() / counted
    assert abs(value.item() - exact) <= 3e-7 * losses.double().abs().sum() / counted


def test_a_row_that_is_not_a_number_is_seen(backend, device):
    losses, labels = torch.tensor([1.0, float("nan"), 2.0], device=device), torch.tensor([0, 1, 2], device=device)
    for mean in (False, True):
        value, factor = select(losses).reduce_losses(losses, labels, ignore_index=-100, mean=mean)
        assert value.isnan()
        assert factor.isfinite()
