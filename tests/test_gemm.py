"""Every route of the matrix products gives the product."""

from __future__ import annotations

import pytest
import torch

from loku_kernels import gemm, processor


@pytest.mark.parametrize("onednn", [False, True])
@pytest.mark.parametrize("shape", [(3, 5, 7), (64, 64, 64), (100, 70, 130), (0, 64, 64)])
def test_float32_products_keep_float32_accuracy(monkeypatch, onednn, shape):
    """oneDNN's route, forced on and off, on contiguous and transposed operands."""
    monkeypatch.setattr(processor, "is_amd", lambda: onednn)
    monkeypatch.setattr(processor, "has_avx512", lambda: onednn)
    n, k, m = shape
    a, b, bias = torch.randn(n, k), torch.randn(k, m), torch.randn(m)
    truth = a.double() @ b.double()
    bound = {"rtol": 0.0, "atol": 1e-6 * k}
    torch.testing.assert_close(gemm.mm(a, b).double(), truth, **bound)
    torch.testing.assert_close(gemm.mm(a, b.t().contiguous().t()).double(), truth, **bound)
    torch.testing.assert_close(gemm.mm(a.t().contiguous().t(), b).double(), truth, **bound)
    torch.testing.assert_close(gemm.linear(a, b.t(), bias).double(), truth + bias, **bound)


def test_widened_products_whatever_the_default_dtype(monkeypatch):
    monkeypatch.setattr(processor, "multiplies", lambda dtype: False)
    a, b = torch.randn(3, 50).bfloat16(), torch.randn(50, 7).bfloat16()
    expected = gemm.mm(a, b)
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert torch.equal(gemm.mm(a, b), expected)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("elements", [1, 1000, 1 << 22])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(3, 50, 7), (64, 64, 64), (0, 64, 64), (5, 300, 1)])
def test_widened_products_round_once(monkeypatch, dtype, shape, elements):
    """On processors without instructions for a 16-bit type: sums in float32, whatever the blocks."""
    monkeypatch.setattr(processor, "multiplies", lambda dtype: False)
    monkeypatch.setattr(gemm, "_WIDENED_ELEMENTS", elements)
    n, k, m = shape
    a, b, bias = (torch.randn(size).to(dtype) for size in ((n, k), (k, m), (m,)))
    truth = a.double() @ b.double()
    bound = {"rtol": torch.finfo(dtype).eps / 2, "atol": 1e-6 * k}
    for found, expected in (
        (gemm.mm(a, b), truth),
        (gemm.mm(a.t().contiguous().t(), b.t().contiguous().t()), truth),
        (gemm.linear(a, b.t()), truth),
        (gemm.linear(a, b.t(), bias), truth + bias.double()),
    ):
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), expected, **bound)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_add_outer_sums_in_the_dtype_of_the_total(device, dtype):
    a, b = torch.randn(200, 30).to(device, dtype), torch.randn(200, 20).to(device, dtype)
    total = torch.randn(30, 20, device=device)
    expected = total.double() + a.double().t() @ b.double()
    gemm.add_outer_(total, a, b)
    torch.testing.assert_close(total.double(), expected, rtol=1e-5, atol=1e-4)


def test_slow_bfloat16_products_are_widened_where_that_pays(monkeypatch):
    monkeypatch.setattr(processor, "has_slow_bfloat16", lambda: True)
    monkeypatch.setattr(processor, "multiplies", lambda dtype: True)
    rows = {torch.bfloat16: [1, 63, 64, 500], torch.float16: [500], torch.float32: [500]}
    widened = {
        dtype: [n for n in counts if gemm.is_widened(torch.empty(n, 8, dtype=dtype))] for dtype, counts in rows.items()
    }
    assert widened == {torch.bfloat16: [64, 500], torch.float16: [], torch.float32: []}


@pytest.mark.parametrize(
    ("description", "slow"),
    [
        ("vendor_id : GenuineIntel\nflags : avx2 avx512f avx512_bf16 avx512_fp16", True),
        ("vendor_id : GenuineIntel\nflags : avx2 avx512f avx512_bf16 amx_bf16 avx512_fp16 amx_tile", False),
        ("vendor_id : GenuineIntel\nflags : avx2 avx512f", False),
        ("vendor_id : AuthenticAMD\nflags : avx2 avx512f avx512_bf16 avx512_fp16", False),
        ("", False),
    ],
)
def test_slow_bfloat16_is_told_by_vendor_and_flags(monkeypatch, description, slow):
    monkeypatch.setattr(processor, "_description", lambda: description)
    processor.has_slow_bfloat16.cache_clear()
    try:
        assert processor.has_slow_bfloat16() == slow
    finally:
        processor.has_slow_bfloat16.cache_clear()
