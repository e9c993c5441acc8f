from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    """For every test of small models here."""


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Folder of the real data sets; skips the test where there is none."""
    folder = Path(os.environ.get("LOKU_DATA", Path(__file__).parents[3] / "shared" / "data"))
    if not (folder / "tofu_eval_logs").is_dir():
        pytest.skip("no data sets: neither LOKU_DATA nor ../shared/data has them")
    return folder
