"""``python -m loku_kernels`` on this machine and on one where nothing could be built."""

from __future__ import annotations

import subprocess
import sys

import torch

from loku_kernels import backends
from loku_kernels.__main__ import report


def test_report_runs_as_a_module():
    done = subprocess.run([sys.executable, "-m", "loku_kernels"], capture_output=True, text=True, check=True)
    assert f"torch        {torch.__version__}" in done.stdout and "reference      available" in done.stdout


def test_report_says_why_a_backend_is_missing(monkeypatch):
    monkeypatch.setattr(backends.cpp, "missing_reason", lambda: "no compiler was found")
    monkeypatch.setattr(backends.cpp, "instruction_sets", lambda: ())
    assert "cpp            missing: no compiler was found" in report()
