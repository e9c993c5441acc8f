"""Bad input raises an error that names the argument."""

from __future__ import annotations

import warnings

import pytest
import torch

import loku_kernels as lk
from loku_kernels import backends

Z, Y = torch.randn(2, 3, 40), torch.zeros(2, 3, dtype=torch.int64)
H, W = torch.randn(2, 3, 8), torch.randn(40, 8)
_TWICE = torch.tensor([1, 0, 1])


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (TypeError, "logits must be a torch.Tensor", lambda: lk.fused_ihl([1.0], Y)),
        (TypeError, "logits must be float32.*int64", lambda: lk.fused_ihl(Y, Y)),
        (ValueError, "logits.*scalar", lambda: lk.fused_ihl(torch.tensor(1.0), torch.tensor(0))),
        (ValueError, "last dimension of logits.*at least 2", lambda: lk.fused_ihl(Z[..., :1], Y)),
        (TypeError, "labels must be a torch.Tensor", lambda: lk.fused_ihl(Z, [0])),
        (TypeError, "labels must be an integer", lambda: lk.fused_ihl(Z, Y.float())),
        (ValueError, r"labels must have the shape.*\(2, 3\).*\(3, 2\)", lambda: lk.fused_ihl(Z, Y.t())),
        (ValueError, r"labels must lie in \[0, 40\).*40.*row 0", lambda: lk.fused_ihl(Z, Y + 40)),
        (ValueError, r"labels must lie in.*-1", lambda: lk.target_statistics(Z, Y - 1)),
        (ValueError, "labels must lie in", lambda: lk.fused_linear_ihl(H, W, Y + 40)),
        (ValueError, "labels must lie in", lambda: lk.linear_target_statistics(H, W, Y + 40)),
        (ValueError, "reduction must be one of.*'avg'", lambda: lk.fused_cross_entropy(Z, Y, reduction="avg")),
        (ValueError, "num_items_in_batch.*'sum'", lambda: lk.fused_ihl(Z, Y, reduction="sum", num_items_in_batch=3)),
        (ValueError, "logit_softcap must be positive.*-1", lambda: lk.fused_ihl(Z, Y, logit_softcap=-1.0)),
        (ValueError, "logit_softcap must be.*at most 1e.*inf", lambda: lk.fused_ihl(Z, Y, logit_softcap=float("inf"))),
        (ValueError, "logit_softcap must be.*at most 1e.*31", lambda: lk.fused_ihl(Z, Y, logit_softcap=1e31)),
        (TypeError, "logit_softcap must be a number.*'30'", lambda: lk.fused_ihl(Z, Y, logit_softcap="30")),
        (TypeError, "logits must be dense", lambda: lk.fused_ihl(Z.to_sparse(), Y)),
        (ValueError, "ignore_index must fit into 64 bits", lambda: lk.fused_ihl(Z, Y, ignore_index=2**63)),
        (TypeError, "num_items_in_batch must be.*'3'", lambda: lk.fused_ihl(Z, Y, num_items_in_batch="3")),
        (TypeError, "num_items_in_batch must be real", lambda: lk.fused_ihl(Z, Y, num_items_in_batch=torch.tensor(1j))),
        (ValueError, "logit_scale", lambda: lk.fused_ihl(Z, Y, logit_scale=0.0)),
        (TypeError, "logit_scale must be a number.*'a'", lambda: lk.fused_ihl(Z, Y, logit_scale="a")),
        (TypeError, "ignore_index must be an integer.*None", lambda: lk.fused_ihl(Z, Y, ignore_index=None)),
        (ValueError, "num_items_in_batch.*one number", lambda: lk.fused_ihl(Z, Y, num_items_in_batch=torch.ones(2))),
        (ValueError, "inplace.*stride 1", lambda: lk.fused_ihl(Z.transpose(0, 2), Y[0, 0].expand(40, 3), inplace=True)),
        (ValueError, "inplace.*share no memory", lambda: lk.fused_ihl(Z[:1].expand(2, 3, 40), Y, inplace=True)),
        (
            ValueError,
            "inplace.*share no memory",
            lambda: lk.fused_ihl(Z.view(-1).unfold(0, 40, 20)[None, :3], Y[:1], inplace=True),
        ),
        (ValueError, "labels must be on the device of logits", lambda: lk.fused_ihl(Z, Y.to("meta"))),
        (ValueError, "shift_labels", lambda: lk.fused_ihl(Z[0, 0], Y[0, 0], shift_labels=True)),
        (ValueError, "ihl_weight must broadcast", lambda: lk.fused_unlearning_loss(Z, Y, torch.ones(4), 0.0)),
        (TypeError, "ihl_weight must be a number", lambda: lk.fused_unlearning_loss(Z, Y, [1.0], 0.0)),
        (ValueError, "ihl_weight must be a finite number", lambda: lk.fused_unlearning_loss(Z, Y, float("nan"), 0.0)),
        (ValueError, "ce_weight must be a finite number", lambda: lk.fused_unlearning_loss(Z, Y, 1.0, -1e39)),
        (TypeError, "ihl_weight must be real", lambda: lk.fused_unlearning_loss(Z, Y, torch.tensor(1j), 0.0)),
        (
            ValueError,
            "ce_weight.*no gradient",
            lambda: lk.fused_unlearning_loss(Z, Y, 0, torch.ones(3).requires_grad_()),
        ),
        (TypeError, "weight must have the dtype of hidden", lambda: lk.fused_linear_ihl(H, W.bfloat16(), Y)),
        (ValueError, r"weight must be \(vocabulary, hidden size\)", lambda: lk.fused_linear_ihl(H, W[0], Y)),
        (ValueError, r"weight must be.*\(40, 0\)", lambda: lk.fused_linear_ihl(H[..., :0], W[:, :0], Y)),
        (TypeError, "weight must be a torch.Tensor", lambda: lk.fused_linear_ihl(H, None, Y)),
        (TypeError, "hidden must be a torch.Tensor", lambda: lk.linear_target_statistics([1.0], W, Y)),
        (ValueError, "hidden must end in.*8", lambda: lk.fused_linear_ihl(H[..., :7], W, Y)),
        (ValueError, r"bias must have shape \(40,\)", lambda: lk.fused_linear_ihl(H, W, Y, bias=torch.ones(39))),
        (TypeError, "rows must be a torch.Tensor", lambda: lk.fused_linear_ihl(H, W, Y, rows=[0])),
        (ValueError, "rows must be", lambda: lk.fused_linear_ihl(H, W, Y, rows=torch.ones(2))),
        (ValueError, "rows must lie in.*6", lambda: lk.fused_linear_ihl(H, W, Y, rows=torch.tensor([0, 6]))),
        (ValueError, "rows must name each row once, but 1 comes 2", lambda: lk.fused_linear_ihl(H, W, Y, rows=_TWICE)),
        (TypeError, "chunk_bytes must be an integer", lambda: lk.fused_linear_ihl(H, W, Y, chunk_bytes=1e6)),
        (ValueError, "chunk_bytes must be positive", lambda: lk.fused_linear_ihl(H, W, Y, chunk_bytes=0)),
    ],
)
def test_errors_name_the_argument(error, message, call):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(
    "loss",
    [
        lambda z: lk.fused_ihl(z, Y[0]),
        lambda z: lk.target_statistics(z, Y[0]).rest.sum(),
        lambda z: lk.fused_linear_cross_entropy(z, torch.eye(40), Y[0]),
        lambda z: lk.linear_target_statistics(torch.eye(40)[:3], z.T @ z, Y[0]).rest.sum(),
    ],
)
def test_forward_mode_is_refused(loss):
    """It would find tangents of zero."""
    with pytest.raises(RuntimeError, match="carries a tangent of forward-mode differentiation"):
        torch.func.jvp(loss, (Z[0],), (torch.ones_like(Z[0]),))


def test_unknown_backends_are_refused_with_the_usable_ones():
    with pytest.raises(ValueError, match=r"'cuda' cannot be used.*usable here:.*reference"), backends.use("cuda"):
        pass


def test_without_kernels_the_reference_serves_with_one_warning(monkeypatch):
    """As after an installation without a compiler."""
    monkeypatch.setattr(backends.cpp, "missing_reason", lambda: "the extension was not built")
    backends._default.cache_clear()
    try:
        with pytest.warns(UserWarning, match="the extension was not built") as caught:
            first = lk.fused_ihl(Z, Y)
            second = lk.fused_ihl(Z, Y)
        assert len(caught) == 1 and torch.equal(first, second)
        with backends.use("reference"):
            assert torch.equal(lk.fused_ihl(Z, Y), first)
    finally:
        backends._default.cache_clear()


def test_float64_is_served_by_the_reference_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert lk.fused_ihl(Z.double(), Y).dtype == torch.float64
