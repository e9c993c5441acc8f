from __future__ import annotations

from pathlib import Path

import pytest
from cli_setup import Workshop

from loku.cli import main


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    """For every test of small models here."""


@pytest.fixture(autouse=True)
def _alone(monkeypatch):
    monkeypatch.delenv("LOKU_DATA", raising=False)
    monkeypatch.delenv("LOKU_TRACEBACK", raising=False)

    def offline(*args, **options):
        raise ConnectionError("no network in tests")

    monkeypatch.setattr("loku.data.records.load_dataset", offline)


@pytest.fixture(scope="session")
def workshop(tmp_path_factory) -> Workshop:
    """Models of each family, their tokenizer, and data in the published formats."""
    return Workshop.make(tmp_path_factory.mktemp("workshop"))


@pytest.fixture
def loku(capsys):
    """Calls a command, which must succeed, and returns what it printed."""

    def call(*words: object) -> str:
        capsys.readouterr()
        status = main([str(word) for word in words])
        printed = capsys.readouterr()
        assert status == 0, printed.err
        return printed.out

    return call


@pytest.fixture
def refused(capsys):
    """Calls a command, which must say in one line what is wrong, and returns the line."""

    def call(*words: object) -> str:
        capsys.readouterr()
        status = main([str(word) for word in words])
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("loku: error: ")]
        assert status == 1 and len(lines) == 1
        return lines[0]

    return call


@pytest.fixture
def no_plots(monkeypatch):
    """Drawing a report takes longer than a small model's training."""
    monkeypatch.setattr("loku.cli.unlearn.write_report", lambda runs, folder: None)


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "run"
