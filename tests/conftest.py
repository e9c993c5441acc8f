"""Every operator test runs on every backend that this machine has; without a GPU, Triton runs in its interpreter."""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before the kernels are imported

import pytest

from loku_kernels import backends

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # there is a worker for each core

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
_NAMES = ["reference", "triton", "cpp:portable", "cpp:avx2", "cpp:avx512", "cpp:avx512bf16"]


def _unusable(name: str) -> str | None:
    if name.startswith("cpp") and DEVICE.type != "cpu":
        return "the C++ backend serves CPU tensors"
    return backends.available().get(name, "not built, or not an instruction set of this processor")


@pytest.fixture(params=_NAMES)
def backend(request: pytest.FixtureRequest):
    """Name of the backend that the test runs on."""
    reason = _unusable(request.param)
    if reason is not None:
        pytest.skip(f"{request.param}: {reason}")
    with backends.use(request.param):
        yield request.param


@pytest.fixture
def device() -> torch.device:
    return DEVICE


@pytest.fixture
def one_thread():
    """More threads only slow small models down."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="torch sees no CUDA device"))
