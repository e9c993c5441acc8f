"""What is in the folders that the user names: nothing that a command did not write is replaced or deleted."""

from __future__ import annotations

import pytest

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
