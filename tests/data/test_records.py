from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pytest
from data_helpers import shared_data, word_tokenizer

from loku.data import (
    DEFAULT_REFUSALS,
    TOFU_SPLITS,
    load_records,
    load_refusals,
    read_json_lines,
    tokenise,
    with_refusals,
)

TDEC = ("preprefix", "prefix", "suffix")
SEQUENCES = np.arange(3 * 200, dtype=np.uint16).reshape(3, 200) + 50000
QA = [{"question": f"q{i}", "answer": f"a{i}"} for i in range(4)]


def write(path: Path, records: list, ending: str = "\n") -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(json.dumps(record) for record in records) + ending, encoding="utf-8")
    return path


@pytest.fixture(autouse=True)
def hub(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """No test reaches the network: what was asked of the hub, which answers with two rows of everything."""
    asked = []

    def load_dataset(name: str, configuration: str, split: str) -> datasets.Dataset:
        asked.append((name, configuration, split))
        if name == "locuslab/TOFU":
            return datasets.Dataset.from_list(QA[:2])
        if name == "dar-tau/lm-extraction-benchmark":
            return datasets.Dataset.from_dict(dict(zip(TDEC, np.split(SEQUENCES[:2], [100, 150], axis=1), strict=True)))
        lines = ["", " = One = \n", "", " text = \n", " = 1 / s \n", "", " = = Section = = \n", "", " end \n", "", ""]
        return datasets.Dataset.from_dict({"text": [*lines, " = Two = \n", "", " text \n"]})

    monkeypatch.setattr("loku.data.records.load_dataset", load_dataset)
    monkeypatch.delenv("LOKU_DATA", raising=False)
    return asked


def test_tofu_from_a_folder_from_the_environment_and_from_the_hub(tmp_path, monkeypatch, hub):
    write(tmp_path / "tofu" / "forget01.json", QA)
    assert load_records("forget01", tmp_path) == QA
    monkeypatch.setenv("LOKU_DATA", str(tmp_path))
    assert load_records("forget01") == QA
    assert not hub
    assert load_records("retain99") == QA[:2]  # the folder does not have it
    monkeypatch.delenv("LOKU_DATA")
    assert load_records("forget01") == QA[:2]
    assert hub == [("locuslab/TOFU", "retain99", "train"), ("locuslab/TOFU", "forget01", "train")]


@pytest.mark.parametrize(
    ("rows", "expected"), [("[0:2]", QA[:2]), ("[3:]", QA[3:]), ("[:-1]", QA[:3]), ("[0:4]", QA), ("[:]", QA)]
)
def test_rows(tmp_path, rows, expected):
    path = write(tmp_path / "mine.jsonl", QA)
    assert load_records(f"{path}{rows}") == expected


@pytest.mark.parametrize("rows", ["[0:5]", "[4:]", "[2:2]", "[-5:]"])
def test_rows_that_do_not_exist(tmp_path, rows):
    """Python would give fewer, and nobody would know."""
    path = write(tmp_path / "mine.jsonl", QA)
    with pytest.raises(ValueError, match="must name rows that exist: there are 4"):
        load_records(f"{path}{rows}")


def test_own_files(tmp_path):
    records = [{"question": "q", "answer": "a", "more": 1}, {"text": "line\u2028separator"}, {"input_ids": [1, 2]}]
    assert load_records(str(write(tmp_path / "lines.jsonl", records))) == records
    assert load_records(str(write(tmp_path / "without_last_newline.json", records, ending=""))) == records
    array = tmp_path / "array.json"
    array.write_text(json.dumps(records, indent=1), encoding="utf-8")
    assert load_records(str(array)) == records
    raw = tmp_path / "raw.jsonl"
    raw.write_text('\ufeff{"text": "a\u2028b"}\r\n\r\n{"text": "c"}\r\n', encoding="utf-8", newline="")
    assert load_records(str(raw)) == [{"text": "a\u2028b"}, {"text": "c"}]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no records"),
        (b"\n \n", "holds no records"),
        (b"[]", "holds no records"),
        (b'{"text": "a"}\n{"text": "b', r"mine.jsonl, line 2: not valid JSON \(Unterminated string"),
        (b'{"text": "a"}\n\n{"text": "b"}{}\n', "line 3: not valid JSON"),
        (b'{"text": "a"}\n{"n": ' + b"1" * 5000 + b"}\n", "line 2: not to be read"),
        (b'{"text": ' + b"[" * 200_000 + b"]" * 200_000 + b"}\n", "line 1: not to be read"),
        (b'{"text": "a"}\n3\n', "line 2: expected a JSON object, got int"),
        (b'{"text": "a"}\n{"text": "\xff"}', "not UTF-8"),
        (b'{"text": "a"}\n{"question": "b"}\n', r"line 2: expected question and answer, .* keys \['question'\]"),
        (b'{"text": null}\n', "line 1: text must be a string, got None"),
        (b'{"question": "a", "answer": ["b"]}\n', "line 1: answer must be a string"),
        (b'{"input_ids": [1, true]}\n', "line 1: input_ids must be a list of token ids"),
        (b'{"input_ids": []}\n', "line 1: input_ids must be a list of token ids, not empty"),
        (b'{"input_ids": [1, 2], "labels": ["x", 2]}\n', "line 1: labels must be a list of token ids, and -100"),
        (b'{"input_ids": [1, 2], "labels": [1, -2]}\n', "line 1: labels must be a list of token ids, and -100"),
        (b'{"input_ids": [1, 2], "labels": 2}\n', "line 1: labels must be a list of token ids, and -100"),
        (
            rb'{"question": "Who? \ud83d", "answer": "A"}',
            r"line 1: question must be text, but '\\ud83d' at character 5",
        ),
        (
            rb'{"question": "Who?", "answer": "A \ude00"}',
            r"line 1: answer must be text, but '\\ude00' at character 2",
        ),
        (b'{"text": "a", "question": "b", "answer": 3}\n', "line 1: answer must be a string, got 3"),
    ],
)
def test_damaged_files(tmp_path, content, message):
    path = tmp_path / "mine.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_records(str(path))


def test_the_line_is_named_by_all_who_find_fault(tmp_path):
    """Blank lines count, and rows that are left out."""
    path = tmp_path / "mine.jsonl"
    path.write_text('{"text": "a b"}\n\n{"text": "a b"}\n\n{"text": "a"}\n')
    with pytest.raises(ValueError, match=r"^line 5: nothing to score in a text of 1 tokens"):
        tokenise(load_records(f"{path}[1:]"), word_tokenizer())
    with pytest.raises(ValueError, match=r"^line 3: only a question can be refused"):
        with_refusals(load_records(f"{path}[1:]"))
    path.write_text('\n{"question": "who", "answer": "Ada"}\n')
    with pytest.raises(ValueError, match=r"^line 2: 6 tokens, but max_length = 5"):
        tokenise(with_refusals(load_records(str(path)), ["a b c"]), word_tokenizer(), max_length=5)
    path.write_text('{"text": "a"}\n\n{"text": 3}\n')
    with pytest.raises(ValueError, match=r"mine.jsonl, line 3: text must be a string"):
        load_records(str(path))
    path.write_text('[{"text": "a b"}, {"text": "a"}]')
    with pytest.raises(ValueError, match=r"^item 1: nothing to score"):
        tokenise(load_records(str(path)), word_tokenizer())


def test_a_whole_surrogate_pair_is_a_character(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_bytes(rb'{"text": "a \ud83d\ude00"}')
    assert load_records(str(path)) == [{"text": "a \U0001f600"}]


def test_a_damaged_split_is_no_reason_to_go_to_the_hub(tmp_path, hub):
    path = write(tmp_path / "tofu" / "forget01.json", QA)
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ValueError, match=r"forget01.json, line 4: not valid JSON"):
        load_records("forget01", tmp_path)
    assert not hub


@pytest.mark.parametrize("source", ["forget02", "tdec:test", "wikitext", "forget01[3]", "forget01[a:b]", ""])
def test_unknown_sources_are_told_what_exists(source):
    with pytest.raises(ValueError, match=r"none of TOFU's splits \(full, forget01, .*wikitext2:validation"):
        load_records(source)


def test_unknown_split_of_wikitext():
    with pytest.raises(ValueError, match=r"the splits are wikitext2:train, wikitext2:validation, wikitext2:test"):
        load_records("wikitext2:valid")


def test_missing_files_and_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"mine\.jsonl: no such file"):
        load_records(str(tmp_path / "mine.jsonl"))
    with pytest.raises(FileNotFoundError, match=r"must be a folder, got '.*nowhere'"):
        load_records("forget01", tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"tdec needs val_preprefix\.npy"):
        load_records("tdec", tmp_path)


def test_hub_out_of_reach(tmp_path, monkeypatch):
    def load_dataset(*_: str, **__: str) -> None:
        raise OSError("no route")

    monkeypatch.setattr("loku.data.records.load_dataset", load_dataset)
    with pytest.raises(ConnectionError, match=r"forget05.json does not exist, and locuslab/TOFU .*OSError: no route"):
        load_records("forget05", tmp_path)
    with pytest.raises(ConnectionError, match="neither data_dir nor LOKU_DATA is set"):
        load_records("forget05")


def test_tdec(tmp_path):
    (tmp_path / "tdec").mkdir()
    for part, tokens in zip(TDEC, np.split(SEQUENCES, [100, 150], axis=1), strict=True):
        np.save(tmp_path / "tdec" / f"val_{part}.npy", tokens)
    assert [record["input_ids"] for record in load_records("tdec", tmp_path)] == SEQUENCES.tolist()
    assert load_records("tdec[1:2]", tmp_path) == [{"input_ids": SEQUENCES[1].tolist()}]
    np.save(tmp_path / "tdec" / "val_prefix.npy", SEQUENCES[:2, :50])
    with pytest.raises(ValueError, match="cannot be read and joined"):
        load_records("tdec", tmp_path)
    cut = tmp_path / "tdec" / "val_suffix.npy"
    cut.write_bytes(cut.read_bytes()[:200])
    with pytest.raises(ValueError, match="cannot be read and joined"):
        load_records("tdec", tmp_path)


def test_tdecs_training_set_from_a_folder_and_from_the_hub(tmp_path, hub):
    expected = [{"input_ids": tokens} for tokens in SEQUENCES.tolist()]
    assert load_records("tdec:train", tmp_path) == expected[:2]
    assert load_records("tdec:train[1:2]") == expected[1:2]
    assert hub == [("dar-tau/lm-extraction-benchmark", "default", "train")] * 2
    (tmp_path / "tdec").mkdir()
    for part, tokens in zip(TDEC, np.split(SEQUENCES, [100, 150], axis=1), strict=True):
        np.save(tmp_path / "tdec" / f"train_{part}.npy", tokens)
    assert load_records("tdec:train", tmp_path) == expected
    assert len(hub) == 2


def test_wikitext_is_the_same_from_the_hub_and_from_a_file(tmp_path, hub):
    """The hub gives lines, of which blank ones are empty; the file has a blank in those."""
    first = " \n = One = \n \n text = \n = 1 / s \n \n = = Section = = \n \n end \n \n \n"
    articles = [{"text": first}, {"text": " = Two = \n \n text \n"}]
    assert load_records("wikitext2:train", tmp_path) == articles
    assert hub == [("Salesforce/wikitext", "wikitext-2-raw-v1", "train")]
    (tmp_path / "wikitext2").mkdir()
    (tmp_path / "wikitext2" / "valid.txt").write_text("".join(a["text"] for a in articles), encoding="utf-8")
    assert load_records("wikitext2:validation", tmp_path) == articles
    assert len(hub) == 1


def test_published_data():
    folder = shared_data()
    counts = {split: len(load_records(split, folder)) for split in TOFU_SPLITS}
    assert {counts[f"forget{p}"] + counts[f"retain{100 - int(p)}"] for p in ("01", "05", "10")} == {
        counts["full"],
        4000,
    }
    assert load_records("forget10", folder) == load_records("full[3600:]", folder)
    assert all(len(record["perturbed_answer"]) == 5 for record in load_records("forget01_perturbed", folder))
    sequences = load_records("tdec", folder)
    assert Counter(len(record["input_ids"]) for record in sequences) == {200: 1000}
    assert max(max(record["input_ids"]) for record in sequences) < 50257
    for split, file in (("validation", "valid"), ("test", "test")):
        articles = load_records(f"wikitext2:{split}", folder)
        assert len(articles) == 60  # as published
        assert "".join(a["text"] for a in articles) == (folder / "wikitext2" / f"{file}.txt").read_text(
            encoding="utf-8"
        )
    assert len(load_refusals(folder / "tofu" / "idontknow.jsonl")) == 100


def test_refusals(tmp_path):
    path = tmp_path / "refusals.txt"
    path.write_text("No idea.\n\n  Pass. \n", encoding="utf-8-sig")
    refusals = load_refusals(path)
    assert refusals == ["No idea.", "Pass."]
    preferred = with_refusals(QA * 10, refusals, seed=1)
    assert [record["question"] for record in preferred] == [record["question"] for record in QA * 10]
    assert {record["answer"] for record in preferred} == set(refusals)
    assert with_refusals(QA[:2], refusals, seed=1) == preferred[:2]
    assert with_refusals(QA * 10, refusals, seed=2) != preferred
    assert with_refusals(QA)[0]["answer"] in DEFAULT_REFUSALS
    with pytest.raises(ValueError, match=r"record 1: only a question can be refused, got the keys \['text'\]"):
        with_refusals([QA[0], {"text": "a"}])
    with pytest.raises(ValueError, match="refusals must not be empty"):
        with_refusals(QA, [])
    path.write_text("\n", encoding="utf-8")
    with pytest.raises(ValueError, match="holds no refusals"):
        load_refusals(path)


def test_read_json_lines_takes_any_objects(tmp_path):
    assert read_json_lines(write(tmp_path / "log.jsonl", [{"step": 1}, {}])) == [{"step": 1}, {}]
