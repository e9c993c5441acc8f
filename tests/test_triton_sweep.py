"""A sweep in rounds of several tiles, as on a GPU: elsewhere in the tests the interpreter has one tile a round."""

from __future__ import annotations

import pytest
import torch
from oracle import DTYPES, random_problem

pytest.importorskip("triton")

from loku_kernels.backends import formulas, reference
from loku_kernels.backends.triton import fused, launch, losses
from loku_kernels.backends.weights import RowWeights

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LANES, ROWS = 64, 3
WEIGHTS = RowWeights(None, 1.0, None, 1.0)
SETTINGS = {"ignore_index": -100, "scale": 1.0, "softcap": 0.0}

pytestmark = pytest.mark.skipif(
    DEVICE.type == "cpu" and not launch.INTERPRETED, reason="there is no GPU, and Triton is not interpreted"
)


@pytest.mark.parametrize("kernel", [losses.row_losses_kernel, fused.row_losses_and_gradient_kernel])
@pytest.mark.parametrize("tiles", [0.3, 1, 2.5, 3.6, 5.2, 8])
@pytest.mark.parametrize("ahead", [2, 3, 5])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_whole_rounds_and_what_is_left(dtype, ahead, tiles, kernel):
    granule = launch.LOAD_BYTES // dtype.itemsize
    logits, labels = random_problem(ROWS, int(tiles * LANES * granule) + 3, dtype, DEVICE)
    chosen = {"GRANULE": granule, "TRANSFORM": "none", "LANES": LANES, "AHEAD": ahead, "num_warps": 2} | launch.OPTIONS
    truth, true_index = reference.row_losses(logits[None].double(), labels, WEIGHTS, **SETTINGS)
    rows, index = losses.run_sweep(kernel, ROWS, chosen, logits[None].clone(), labels, WEIGHTS, *SETTINGS.values())
    swept = [formulas.TARGET, formulas.REST, formulas.RUNNER_UP]
    assert torch.equal(index, true_index)
    torch.testing.assert_close(rows[swept].double(), truth[swept], rtol=2e-6, atol=0)
