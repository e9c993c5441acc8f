"""The factors against the closed form with an exact SVD, layer by layer."""

from __future__ import annotations

import pytest
import torch
from fila_models import FAMILIES, adapted, build, original_weights, some_state

from loku.fila import FilaConfig, initialize_lora_fila_weights
from loku.fila.factors import Factors, fila_factors, residual_weight
from loku.fila.targets import base_weight, lora_layers


def closed_form(weight: torch.Tensor, d: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """diag(1/d) U S V^T, and S, in float64."""
    d = d.double()
    U, S, Vh = torch.linalg.svd(d[:, None] * weight.double(), full_matrices=False)
    inverse = torch.where(d > 0, 1 / d, 0.0)
    return inverse[:, None] * (U[:, :rank] * S[:rank]) @ Vh[:rank], S[:rank]


@pytest.mark.parametrize("mode", ["residual", "shadow"])
@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("family", [*FAMILIES, "gpt2"])
@pytest.mark.parametrize("dtype,tolerance", [(torch.float64, 1e-11), (torch.float32, 2e-5)])
def test_every_layer_starts_from_the_closed_form(family, dtype, tolerance, use_rslora, mode):
    base = build(family, dtype)
    patterns = {"rank_pattern": {"q_proj|c_attn": 3}, "alpha_pattern": {r"k_proj|mlp\.c_fc": 5}}
    model = adapted(base, use_rslora=use_rslora, **patterns)
    state = some_state(model)
    initialize_lora_fila_weights(model, state, config=FilaConfig(mode=mode), show_progress_bar=False)
    weights = original_weights(base)
    for name, layer in lora_layers(model, "default").items():
        rank = 3 if name.endswith(("q_proj", "c_attn")) else 4
        alpha = 5 if name.endswith(("k_proj", "mlp.c_fc")) else 6
        scaling = alpha / rank**0.5 if use_rslora else alpha / rank
        A, B = layer.lora_A["default"].weight.double(), layer.lora_B["default"].weight.double()
        expected, S = closed_form(weights[name], state[name], rank)
        scale = expected.abs().max()
        assert (scaling * B @ A - expected).abs().max() <= tolerance * scale, name
        torch.testing.assert_close(A @ A.T, torch.diag(S / scaling), rtol=tolerance, atol=tolerance * float(S[0]))
        assert not B[3].any()
        after = weights[name] - (scaling * B @ A if mode == "residual" else 0)
        rounding = 8 * torch.finfo(dtype).eps * float(weights[name].abs().max()) if mode == "residual" else 0
        torch.testing.assert_close(base_weight(layer).double(), after, rtol=0, atol=rounding)
        assert torch.equal(base_weight(layer)[3].double(), weights[name][3])


def test_a_row_is_projected_however_small_its_weight():
    """s B* A* = W V V^T: rows whose weights span eight decades keep relative accuracy, and never grow."""
    weight = torch.randn(60, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    d = torch.logspace(-8, 0, 60, dtype=torch.float64)
    A, B = fila_factors(weight, d, 5, 2.0, torch.float64)
    V = torch.linalg.svd(d[:, None] * weight, full_matrices=False)[2][:5]
    torch.testing.assert_close(2 * B @ A, weight @ V.T @ V, rtol=1e-9, atol=1e-12)
    residual = residual_weight(weight, Factors(A, B), 2.0, torch.float64)
    assert bool((residual.norm(dim=1) <= weight.norm(dim=1)).all())


def test_what_is_refused():
    weight = torch.randn(6, 5)
    with pytest.raises(ValueError, match="scaling must be positive, got 0"):
        fila_factors(weight, torch.ones(6), 2, 0, torch.float32)
    with pytest.raises(ValueError, match="row_weight is 0 throughout"):
        fila_factors(weight, torch.zeros(6), 2, 1.0, torch.float32)
    with pytest.raises(ValueError, match=r"rank must be from 1 to min\(out, in\) = 5, got 6"):
        fila_factors(weight, torch.ones(6), 6, 1.0, torch.float32)
    with pytest.raises(ValueError, match=r"overflows in torch.float16"):
        fila_factors(weight, torch.full((6,), 1e-12), 2, 1.0, torch.float16)
