"""Reuse of large buffers, and how much memory the operations take."""

from __future__ import annotations

import mmap

import pytest
import torch

import loku_kernels as lk
from loku_kernels import launch, memory, processor

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="gradient memory is kept for CPU tensors")

SHAPE = (64, 200_000)  # 51 MB in float32


@pytest.fixture(autouse=True)
def empty():
    lk.empty_cache()
    yield
    lk.empty_cache()


def step(logits, labels):
    z = logits.detach().requires_grad_()
    lk.fused_ihl(z, labels).backward()
    return z.grad


def test_a_dead_gradient_is_written_over_and_a_living_one_is_not():
    logits, labels = torch.randn(SHAPE), torch.zeros(SHAPE[0], dtype=torch.int64)
    first = step(logits, labels)
    kept, address = first.clone(), first.data_ptr()
    second = step(-logits, labels)
    assert second.data_ptr() != address and torch.equal(first, kept)
    row = first[3]  # a view keeps its memory alive
    del first
    third = step(-logits, labels)
    assert third.data_ptr() not in (address, second.data_ptr()) and torch.equal(row, kept[3])
    del row
    assert step(logits, labels).data_ptr() == address


def test_a_kernel_without_huge_pages(monkeypatch):
    class Plain(mmap.mmap):
        def madvise(self, *_):
            raise OSError(22, "Invalid argument")

    lk.empty_cache()
    monkeypatch.setattr(mmap, "mmap", Plain)
    assert step(torch.randn(SHAPE), torch.zeros(SHAPE[0], dtype=torch.int64)).any()
    lk.empty_cache()


def test_blocks_of_another_size_are_released():
    step(torch.randn(SHAPE), torch.zeros(SHAPE[0], dtype=torch.int64))
    step(torch.randn(3 * SHAPE[0], SHAPE[1]), torch.zeros(3 * SHAPE[0], dtype=torch.int64))
    assert [len(block) for block in memory._blocks] == [3 * SHAPE[0] * SHAPE[1] * 4]
    lk.empty_cache()
    assert not memory._blocks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_empty_is_an_ordinary_tensor(dtype):
    shape = (2, *SHAPE)
    out = memory.empty(shape, dtype, torch.device("cpu"))
    assert out.shape == shape and out.dtype == dtype and out.is_contiguous()
    out.fill_(2.0)
    assert out.sum(dtype=torch.float64).item() == 2.0 * out.numel()


def test_a_destructor_may_empty_the_cache(monkeypatch):
    """Run by the garbage collector while memory is being found."""
    step(torch.randn(SHAPE), torch.zeros(SHAPE[0], dtype=torch.int64))
    find = memory._new_block
    monkeypatch.setattr(memory, "_new_block", lambda n_bytes: (lk.empty_cache(), find(n_bytes))[1])
    out = memory.empty((3, *SHAPE), torch.float32, torch.device("cpu"))
    assert [len(block) for block in memory._blocks] == [out.nbytes]


def test_small_tensors_come_from_torch():
    memory.empty((1000,), torch.float32, torch.device("cpu"))
    assert not memory._blocks


def test_a_chunk_of_logits_is_written_over_the_last_one(monkeypatch):
    """On processors where torch fills a buffer fastest: one block, whatever the number of chunks and calls."""
    monkeypatch.setattr(processor, "is_amd", lambda: False)
    hidden, weight = torch.randn(200, 8), torch.randn(SHAPE[1], 8)
    labels = torch.arange(200)
    for _ in range(2):
        lk.fused_linear_ihl(hidden, weight, labels, chunk_bytes=64 * SHAPE[1] * 4)
        assert [len(block) for block in memory._blocks] == [64 * SHAPE[1] * 4]


@pytest.mark.parametrize(("rows", "vocabulary", "itemsize"), [(1, 50257, 4), (2048, 50257, 4), (8192, 128256, 2)])
@pytest.mark.parametrize("chunk_bytes", [1, 1 << 20, 31 << 20, 100 << 20, 1 << 40])
def test_chunks_keep_the_budget_and_waste_little(rows, vocabulary, itemsize, chunk_bytes):
    height = launch.chunk_rows(rows, vocabulary, itemsize, chunk_bytes)
    assert height == 1 or height * vocabulary * itemsize <= chunk_bytes
    fewest = -(-rows // max(1, chunk_bytes // (vocabulary * itemsize)))
    assert -(-rows // height) == fewest


@pytest.mark.parametrize("device_type", ["cpu", "cuda", "xpu"])
def test_default_budget_covers_every_device(device_type):
    assert launch.default_chunk_bytes(device_type) > 1 << 20


def test_default_chunks_are_not_of_the_heap():
    """There they would leave holes that the next chunk may not fit."""
    height = launch.chunk_rows(2048, 50257, 4, launch.default_chunk_bytes("cpu"))
    assert height * 50257 * 4 > memory._MIN_BYTES
