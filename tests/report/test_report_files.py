"""The report's three files and the terminal's table, from folders with known numbers."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser

import pytest
from rich.console import Console
from run_folders import TDEC_LOG, TOFU_LOG, VERSIONS, make_run, tdec_results

from loku.cli.report import main
from loku.report import Run, summary_table, write_report

_HOSTILE = "<img src=x onerror=alert(1)>|`a`&\"'$x_1$"
_VOID = {"meta", "img", "br", "link", "input"}


class _Page(HTMLParser):
    """Tags, text, and whether every element is closed in order."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.text: list[str] = []
        self.ids: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.ids += [value for name, value in attributes if name == "id"]
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.ids += [value for name, value in attributes if name == "id"]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module")
def two_methods(tmp_path_factory):
    """Three seeds of LoKU, one run of gd."""
    folder = tmp_path_factory.mktemp("runs")
    loku = [
        make_run(folder / f"loku{seed}", seed=seed, results=tdec_results(el, perplexity, seconds))
        for seed, (el, perplexity, seconds) in enumerate([(0.01, 31.0, 9.0), (0.02, 32.0, 10.0), (0.06, 33.0, 11.0)])
    ]
    return [*loku, make_run(folder / "gd", method="gd", results=tdec_results(0.04, 900.0))]


@pytest.fixture(scope="module")
def page(two_methods, tmp_path_factory):
    """The page's path, beside which the other files are."""
    return write_report(two_methods, tmp_path_factory.mktemp("out") / "new", title="Two methods")


def _cells(markdown: str, title: str) -> list[list[str]]:
    section = markdown.split(f"## {title}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def test_markdown_has_the_numbers(page):
    text = page.with_name("report.md").read_text()
    assert text.startswith("# Two methods\n")
    header, _, loku, gd = _cells(text, "Before → after")
    assert header == ["Run", "Runs", "EL₁₀ ↓", "MA ↓", "Perplexity ↓"]
    assert loku == ["loku", "3", "0.900 → 0.030 ± 0.026", "0.950 → 0.300", "30 → 32.00 ± 1.00"]
    assert gd == ["gd", "1", "0.900 → 0.040", "0.950 → 0.300", "30 → 900"]
    costs = _cells(text, "Speed and memory")
    assert costs[0] == ["Run", "Time (s)", "Peak memory (MiB)"] and costs[2] == ["loku", "10.00 ± 1.00", "1,500"]
    assert ["torch", "2.13.0"] in _cells(text, "Versions")


def test_json_has_the_numbers(page):
    report = json.loads(page.with_name("report.json").read_text())
    loku, gd = report["groups"]
    assert report["title"] == "Two methods" and (loku["label"], gd["label"]) == ("loku", "gd")
    assert loku["after"]["el_10"] == pytest.approx({"mean": 0.03, "std": 0.0264575, "count": 3}, rel=1e-5)
    assert gd["after"]["perplexity"] == {"mean": 900.0, "std": None, "count": 1}
    assert loku["costs"]["seconds"]["mean"] == 10.0
    assert [run["config"]["seed"] for run in loku["runs"]] == [0, 1, 2]
    assert loku["runs"][1]["after"]["el_10"] == 0.02 and loku["runs"][1]["versions"] == VERSIONS


def test_statistics_of_forget_quality_are_those_of_its_logarithm(tmp_path):
    for seed, p in enumerate((1e-2, 1e-6)):
        make_run(tmp_path / str(seed), seed=seed, log=[*TOFU_LOG[:1], {"step": 3, "eval_forget_quality": p}])
    write_report([tmp_path / "0", tmp_path / "1"], tmp_path / "out")
    header, _, row = _cells((tmp_path / "out/report.md").read_text(), "Before → after")
    assert "log₁₀ forget quality ↑" in header and not any("Forget quality" in cell for cell in header)
    assert row[header.index("log₁₀ forget quality ↑")] == "-16 → -4.00 ± 2.83"


def test_json_stays_json_with_infinities(tmp_path):
    write_report([make_run(tmp_path / "run", results=tdec_results(0.0, math.inf))], tmp_path / "out")

    def refuse(constant):
        raise AssertionError(constant)

    report = json.loads((tmp_path / "out/report.json").read_text(), parse_constant=refuse)
    assert report["groups"][0]["after"]["perplexity"]["mean"] == "inf"


def test_missing_metrics_leave_gaps_and_no_plots(tmp_path):
    runs = [make_run(tmp_path / "tdec", forget="tdec"), make_run(tmp_path / "tofu", forget="tofu", log=TOFU_LOG)]
    page = write_report(runs, tmp_path / "both").read_text()
    assert "Forget quality against model utility" in page and "Forgetting against utility" in page
    assert "Speed and memory" not in page  # neither run has come to its end
    header, _, tdec, tofu = _cells((tmp_path / "both/report.md").read_text(), "Before → after")
    assert tdec[header.index("Model utility ↑")] == "—" and tofu[header.index("EL₁₀ ↓")] == "—"
    assert tdec[1] == "1 (1 unfinished)"
    page = write_report(runs[:1], tmp_path / "one").read_text()
    assert "Forget quality" not in page and "Model utility" not in page


def test_without_perplexity_utility_is_the_answers_on_the_retain_set(tmp_path):
    first = {"step": 0, "eval_forget_rouge": 0.9, "eval_retain_rouge": 0.8, "eval_forget_loss": 0.1}
    log = [first, first | {"step": 5, "eval_forget_rouge": 0.4}]
    page = write_report([make_run(tmp_path / "run", log=log)], tmp_path / "out").read_text()
    assert "Forget ROUGE-L against Retain ROUGE-L, by run" in page and "Retain ROUGE-L over steps, by run" in page
    assert "Forget loss over" not in page and ">Forget loss" in page  # in the tables alone


def test_of_texts_the_loss_tells_what_was_forgotten(tmp_path):
    log = [{"step": step, "eval_retain_loss": 0.2, "eval_forget_loss": loss} for step, loss in ((0, 0.1), (5, 3.0))]
    run = make_run(tmp_path / "run", log=log)
    assert "Forget loss over steps, by run" in write_report([run], tmp_path / "out").read_text()
    header, *_ = _cells((tmp_path / "out/report.md").read_text(), "Before → after")
    assert "Forget loss ↑" in header


def test_nothing_but_a_loss_makes_a_report_without_plots(tmp_path):
    page = write_report([make_run(tmp_path / "run", log=TDEC_LOG[1:2])], tmp_path / "out").read_text()
    assert "<svg" not in page


def test_the_page_is_whole_and_self_contained(page):
    text = page.read_text()
    found = _Page(text)
    assert found.open == [] and found.tags.count("svg") == 9  # 2 bars, 3 over steps, 2 against perplexity, 2 costs
    assert not {"script", "link", "img", "iframe", "object"} & set(found.tags)
    assert not re.findall(r"(?:https?:)?//(?!www\.w3\.org/(?:2000/svg|1999/xlink)\")", text)
    assert "@import" not in text and len(found.ids) == len(set(found.ids))
    references = set(re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', text))
    assert references and all((a or b) in found.ids for a, b in references)
    assert sorted(file.name for file in page.parent.iterdir()) == ["report.html", "report.json", "report.md"]


def test_colours_follow_the_theme(page):
    style, plots = page.read_text().split("</style>", 1)
    assert not re.search("#[0-9a-f]{6}", plots)  # all are variables of the page
    used = set(re.findall(r"var\((--[\w-]+)\)", plots))
    light, dark = style.split("prefers-color-scheme: dark")
    assert {"--ink", "--series-0", "--series-1"} <= used
    assert all(f"{name}:" in light and f"{name}:" in dark for name in used)


def test_names_that_no_font_has_are_one_warning(tmp_path, monkeypatch):
    monkeypatch.setattr("loku.report.style._FONTS", ("DejaVu Sans",))
    run = make_run(tmp_path / "run", method="忘却 忘", results=tdec_results(0.1, 31.0))
    with pytest.warns(UserWarning) as warned:
        page = write_report([run], tmp_path / "out")
    assert [str(warning.message).partition(",")[0] for warning in warned] == ["no font here has 忘却"]
    assert "忘却 忘" in page.read_text()


def test_names_are_text_and_never_markup(tmp_path):
    runs = [make_run(tmp_path / "a", method=_HOSTILE, results=tdec_results(0.1, 31.0)), make_run(tmp_path / "b")]
    page = _Page(write_report(runs, tmp_path / "out", title=f"</title>{_HOSTILE}").read_text())
    assert "img" not in page.tags and page.open == []
    assert f"</title>{_HOSTILE}" in page.text and _HOSTILE in page.text
    markdown = (tmp_path / "out/report.md").read_text()
    assert "<img" not in markdown.replace(r"\<", "")
    assert all(len(row) == 5 for row in _cells(markdown, "Before → after"))


def test_the_same_runs_give_the_same_files(two_methods, page, tmp_path):
    again = write_report(two_methods, tmp_path, title="Two methods")
    for name in ("report.html", "report.json", "report.md"):
        assert again.with_name(name).read_bytes() == page.with_name(name).read_bytes()


def test_terminal_table_has_the_numbers_at_80_columns(two_methods):
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(summary_table([Run.load(two_methods[0]), *two_methods[1:]]))
    text = console.export_text()
    for number in ("→ 0.030", "± 0.026", "→ 32.00", "1,500", "10.00", "900", "Peak memory (MiB)"):
        assert number in text


def test_names_are_no_markup_in_the_terminal(tmp_path):
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(summary_table([make_run(tmp_path / "a", method="[red]x")], title="Of [v2]"))
    text = console.export_text()
    assert "[red]x" in text and "Of [v2]" in text


def test_a_run_given_twice_is_no_second_seed(tmp_path, monkeypatch):
    folder = make_run(tmp_path / "run", results=tdec_results(0.1, 31.0))
    (tmp_path / "link").symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    write_report(["run", "./run", folder, tmp_path / "link", Run.load("run/../run")], "out")
    (group,) = json.loads((tmp_path / "out" / "report.json").read_text())["groups"]
    assert group["after"]["el_10"]["count"] == 1 and [run["folder"] for run in group["runs"]] == ["run"]


@pytest.mark.parametrize("runs", [[], "runs/loku"])
def test_no_runs_are_refused(runs, tmp_path):
    with pytest.raises(ValueError, match="runs must be a sequence of at least one run or run folder"):
        write_report(runs, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_tells_of_a_seed_that_comes_twice(tmp_path, capsys):
    folders = [make_run(tmp_path / name, seed=seed) for name, seed in (("a", 0), ("b", 1), ("c", 1))]
    folders.append(make_run(tmp_path / "d", seed=1, method="gd"))  # in a group of its own
    folders.append(folders[0])  # which counts once
    main(["--output", str(tmp_path / "report"), "--runs", *map(str, folders)])
    warnings = capsys.readouterr().err.splitlines()
    assert warnings == ["loku: warning: 2 runs of loku have the seed 1: their spread is not that over seeds"]
