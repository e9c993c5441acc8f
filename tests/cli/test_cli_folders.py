"""What is in the folders that the user names: nothing that a command did not write is replaced or deleted."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from cli_setup import QUICK

from loku.cli import main


@pytest.fixture
def interrupted_demo(monkeypatch):
    """Starts a demo, which ends when its training should begin."""
    monkeypatch.setattr("loku.cli.demo._memorise", None)

    def start(*words: object) -> None:
        with pytest.raises(TypeError):
            main(["demo", "--people", "3", "--forget", "1", *map(str, words)])

    return start


@pytest.mark.parametrize("others_config", [None, "model: gpt2\noutput_dir: run\n"])
def test_demo_deletes_no_folder_but_a_demos(refused, folder, others_config):
    (folder / "corpus").mkdir(parents=True)
    (folder / "corpus" / "thesis.txt").write_text("kept")
    if others_config is not None:
        (folder / "config.yaml").write_text(others_config)
    line = refused("demo", "--output_dir", folder, "--overwrite")
    assert f"--output_dir {folder} is not what a demo left" in line
    assert (folder / "corpus" / "thesis.txt").read_text() == "kept"
    file = folder / "corpus" / "thesis.txt"
    assert f"--output_dir {file} is not what a demo left" in refused("demo", "--output_dir", file, "--overwrite")


def test_demo_deletes_what_a_demo_wrote_and_nothing_else(interrupted_demo, folder):
    folder.mkdir()
    interrupted_demo("--output_dir", folder, "--overwrite")  # it was empty
    (folder / "notes.txt").write_text("kept")
    (folder / "target").mkdir()
    (folder / "target" / "results.json").write_text("{}")
    interrupted_demo("--output_dir", folder, "--overwrite")
    assert (folder / "notes.txt").read_text() == "kept" and not (folder / "target").exists()
    assert (folder / "corpus" / "forget.jsonl").exists()


def test_demo_deletes_through_a_link(interrupted_demo, folder, tmp_path):
    folder.mkdir()
    (tmp_path / "link").symlink_to(folder)
    interrupted_demo("--output_dir", tmp_path / "link", "--overwrite")
    (folder / "loku").mkdir()
    interrupted_demo("--output_dir", tmp_path / "link", "--overwrite")
    assert (tmp_path / "link").is_symlink() and not (folder / "loku").exists()


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def mine(workshop, tmp_path) -> Path:
    """The user's folder, with a ``model`` and an ``adapter`` in it, that no run of ours made."""
    shutil.copytree(workshop / "llama", tmp_path / "mine" / "model")
    (tmp_path / "mine" / "adapter").mkdir()
    (tmp_path / "mine" / "adapter" / "adapter_model.safetensors").write_bytes(b"weights")
    return tmp_path / "mine"


def finetune(workshop, model: Path, output: Path) -> list[object]:
    quick = QUICK[: QUICK.index("--rank")]
    return ["finetune", "--model", model, "--train", workshop / "forget.jsonl", "--output_dir", output, *quick]


def test_what_is_read_is_not_replaced(workshop, refused, mine, tmp_path):
    before = contents(mine)
    (tmp_path / "link").symlink_to(mine)
    model, adapter = mine / "model", mine / "adapter"
    export = ["export", "--model", model, "--adapter", adapter, "--output_dir"]
    for read, words in (
        (model, [*export, model, "--format", "merged"]),
        (adapter, [*export, adapter]),
        (model, finetune(workshop, model, mine)),
        (model, finetune(workshop, model, tmp_path / "link")),
        (adapter, workshop.unlearn("ihl", mine, "--adapter", adapter)),
    ):
        for resume in ((), ("--resume",)):
            assert f"would replace {read}, which is read and must stay as it is" in refused(*words, *resume)
    assert contents(mine) == before


def test_a_run_may_begin_beside_its_model(workshop, loku, tmp_path):
    base = shutil.copytree(workshop / "llama", tmp_path / "base")
    before = contents(base)
    loku(*finetune(workshop, base, tmp_path))
    assert (tmp_path / "model" / "model.safetensors").is_file() and contents(base) == before


def test_what_is_no_runs_is_not_replaced(workshop, refused, mine):
    export = ["export", "--model", workshop / "llama", "--adapter", mine / "adapter", "--format", "merged"]
    (mine / "model" / "config.yaml").write_text("mine: true")  # does not make a run's folder of it
    (mine / "corpus").mkdir()
    (mine / "metrics.jsonl").write_text("{}\n")
    before = contents(mine)
    for words, found in (
        ([*export, "--output_dir", mine / "model"], "config.json"),
        (finetune(workshop, workshop / "llama", mine), "model"),
        (workshop.unlearn("ihl", mine), "adapter"),
        (["demo", "--resume", "--output_dir", mine], "corpus"),
        (["evaluate", "--model", workshop / "llama", "--output_dir", mine], "metrics.jsonl"),
    ):
        line = refused(*words)
        assert "is not the folder of a run, which begins with config.yaml and versions.json" in line and found in line
    assert contents(mine) == before


def test_the_users_own_config_is_not_replaced(workshop, loku, refused, folder, tmp_path, no_plots):
    folder.mkdir()
    (tmp_path / "link.yaml").symlink_to(folder / "config.yaml")
    text = f"# mine\noutput_dir: {folder}\n"
    (folder / "config.yaml").write_text(text)
    words = workshop.unlearn("ihl", folder)
    words = [word for word in words if word not in ("--output_dir", folder)]
    for config in (folder / "config.yaml", tmp_path / "link.yaml"):
        line = refused(*words, "--config", config)
        assert f"--config {config} is where the run in --output_dir {folder} records its options" in line
    assert (folder / "config.yaml").read_text() == text
    loku(*words, "--config", folder / "config.yaml", "--resume")
