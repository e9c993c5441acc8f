"""Every command, on small models of each family."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
import torch
import yaml
from cli_setup import CONFIGS, FAMILIES, QUICK, logged, results, same_weights, shared_data
from peft import PeftModel
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from loku.cli import unlearn
from loku.cli.models import model_from_config
from loku.evaluation import generate_greedily, perplexity
from loku.fila import FilaStateDict
from loku.report import Run
from loku.training import METHODS

# What a user without loku would do with what was exported, in a process of its own.
LOADING = """
import sys, torch
from pathlib import Path
from peft import PeftModel
from transformers import AutoModelForCausalLM
models, exported = map(Path, sys.argv[1:])
ids = torch.arange(40)[None]
found = {}
with torch.no_grad():
    for folder in sorted(exported.iterdir()):
        base = AutoModelForCausalLM.from_pretrained(models / folder.name)
        adapted = PeftModel.from_pretrained(base, folder / "adapter").eval()
        merged = AutoModelForCausalLM.from_pretrained(folder / "merged").eval()
        found[folder.name] = {"adapter": adapted(ids).logits, "merged": merged(ids).logits}
torch.save({"logits": found, "loku": "loku" in sys.modules}, exported.with_suffix(".pt"))
"""


IDS = torch.arange(40)[None]


def keep_final_logits(monkeypatch) -> dict[str, torch.Tensor]:
    """By the name of the run's folder, the logits for IDS that a run ends with, taken before anything is written."""
    final, save = {}, unlearn.save_adapter

    def keep_logits(model, path, *args):
        with torch.no_grad():
            final[path.parent.name] = model.eval()(IDS).logits
        save(model, path, *args)

    monkeypatch.setattr(unlearn, "save_adapter", keep_logits)
    return final


@pytest.mark.parametrize("method", sorted(set(METHODS) - {"finetune"}))
def test_unlearn_runs_with_every_method(workshop, loku, folder, no_plots, method):
    family = FAMILIES[sorted(METHODS).index(method) % len(FAMILIES)]
    out = loku(*workshop.unlearn(method, folder, *(workshop.questions if method == "dpo" else ()), family=family))
    assert method in out  # the table
    found = results(folder)
    assert found["steps"] == 2 and found["epochs"] == 1.0 and found["tokens_per_second"] > 0
    expected = {"forget_loss", "retain_loss"} | ({"forget_rouge", "retain_rouge"} if method == "dpo" else set())
    assert found["before"].keys() == found["after"].keys() == expected
    assert found["before"]["forget_loss"] != found["after"]["forget_loss"]
    assert ("importance_seconds" in found) == METHODS[method].fila
    parts = [found[f"{name}_seconds"] for name in ("training", "evaluation")]
    parts += [found.get(f"{name}_seconds", 0) for name in ("importance", "initialisation")]
    assert found["seconds"] == pytest.approx(sum(parts)) and min(parts[:2]) > 0
    run = Run.load(folder)
    assert run.config["method"] == method and run.config["rank"] == 4
    assert torch.__version__.startswith(run.versions["torch"])
    base = AutoModelForCausalLM.from_pretrained(workshop / family)
    model = PeftModel.from_pretrained(base, folder / "adapter")
    assert any(parameter.any() for name, parameter in model.named_parameters() if "lora_B" in name)


def test_what_is_exported_gives_the_logits_of_the_run(workshop, loku, tmp_path, monkeypatch, no_plots):
    final = keep_final_logits(monkeypatch)
    exported = tmp_path / "exported"
    for family in FAMILIES:
        loku(*workshop.unlearn("loku", tmp_path / family, family=family))
        base = ["--model", workshop / family, "--adapter", tmp_path / family / "adapter"]
        for kind in ("adapter", "merged"):
            loku("export", *base, "--format", kind, "--output_dir", exported / family / kind)
        written = {file.name for file in (exported / family / "adapter").iterdir()}
        assert {"adapter_model.safetensors", "adapter_config.json"} <= written and "fila.json" not in written
        assert AutoTokenizer.from_pretrained(exported / family / "merged").eos_token_id == 0
        # What made it makes it again.
        config, again = exported / family / "merged" / "config.yaml", tmp_path / "again" / family
        loku("export", "--config", config, "--output_dir", again)
        assert same_weights(config.parent, again, "model.safetensors")
    command = [sys.executable, "-c", LOADING, str(workshop.root), str(exported)]
    subprocess.run(command, check=True, capture_output=True)
    loaded = torch.load(tmp_path / "exported.pt")
    assert not loaded["loku"]
    for family in FAMILIES:
        with torch.no_grad():
            before = AutoModelForCausalLM.from_pretrained(workshop / family).eval()(IDS).logits
        moved = (final[family] - before).abs().max()
        for kind in ("adapter", "merged"):
            # Stored and live adapter differ in the order of additions only.
            assert (loaded["logits"][family][kind] - final[family]).abs().max() < 1e-4 * moved


@pytest.mark.parametrize("method", ["loku", "ihl"])
def test_an_adapted_head_is_exported_too(workshop, loku, folder, tmp_path, monkeypatch, no_plots, method):
    final = keep_final_logits(monkeypatch)
    loku(*workshop.unlearn(method, folder, "--targets", "q_proj,lm_head"))
    words = ["--model", workshop / "llama", "--adapter", folder / "adapter", "--format", "merged"]
    loku("export", *words, "--output_dir", tmp_path / "merged")
    with safe_open(folder / "adapter" / "adapter_model.safetensors", framework="pt") as file:
        assert any("lm_head.lora_B" in name for name in file.keys())  # noqa: SIM118
    with torch.no_grad():
        before, after = (
            AutoModelForCausalLM.from_pretrained(path).eval()(IDS).logits for path in (words[1], tmp_path / "merged")
        )
    assert (after - final[folder.name]).abs().max() < 1e-4 * (before - final[folder.name]).abs().max()


def test_finetune_from_a_config_with_the_tokenizers_vocabulary(workshop, loku, folder):
    words = ["--model_config", workshop / "model.yaml", "--tokenizer", workshop / "tokenizer"]
    sources = ["--train", workshop / "forget.jsonl", workshop / "retain.jsonl"]
    quick = [word for word in QUICK if word not in ("--rank", "4", "--limit")][:-1]
    loku("finetune", *words, *sources, "--output_dir", folder, *quick)
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    assert model.config.model_type == "gpt_neo" and model.config.vocab_size == len(tokenizer)
    assert model.config.eos_token_id == tokenizer.eos_token_id == 0
    found = results(folder)
    assert found["after"]["train_perplexity"] > 1 and found["steps"] == 2
    assert [line["loss"] for line in logged(folder) if "loss" in line]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_models_own_config_is_a_model_config(workshop, family):
    """As `save_pretrained` wrote it, with what it says of dtype, architecture and version."""
    tokenizer = AutoTokenizer.from_pretrained(workshop / "tokenizer")
    model = model_from_config(str(workshop / family / "config.json"), tokenizer, "auto")
    saved = AutoModelForCausalLM.from_pretrained(workshop / family)
    assert type(model) is type(saved) and model.config.to_dict() == {**saved.config.to_dict(), "_name_or_path": ""}


def test_a_config_of_an_older_transformers_is_a_model_config(workshop, tmp_path):
    config = json.loads((workshop / "llama" / "config.json").read_text())
    older = {"rope_theta": config.pop("rope_parameters")["rope_theta"], "torch_dtype": "float16", "rope_scaling": None}
    (tmp_path / "config.json").write_text(json.dumps(config | older | {"transformers_version": "4.31.0"}, indent="\t"))
    tokenizer = AutoTokenizer.from_pretrained(workshop / "tokenizer")
    model = model_from_config(str(tmp_path / "config.json"), tokenizer, "auto")
    assert model.config.rope_parameters["rope_theta"] == older["rope_theta"] and model.dtype == torch.float32


def test_finetune_goes_on_from_a_model(workshop, loku, folder):
    quick = [*QUICK[: QUICK.index("--rank")], "--learning_rate", "1e-3"]
    loku(
        "finetune",
        "--model",
        workshop / "phi",
        "--train",
        "full",
        "--data_dir",
        workshop.root,
        "--output_dir",
        folder,
        *quick,
    )
    assert AutoModelForCausalLM.from_pretrained(folder / "model").config.model_type == "phi"


def test_importance_is_taken_by_unlearn(workshop, loku, folder, tmp_path, monkeypatch, no_plots):
    rows = tmp_path / "rows"
    out = loku("importance", "--model", workshop / "llama", *workshop.questions, "--output_dir", rows, "--seed", "3")
    assert "14 modules" in out
    file = rows / "importance.safetensors"
    state = FilaStateDict.load(file)
    assert {path.name for path in rows.iterdir()} == {
        "config.yaml", "versions.json", "metrics.jsonl", "results.json", "importance.safetensors"
    }  # fmt: skip
    assert {line["module"]: line["largest"] for line in logged(rows)} == {
        name: float(weights.max()) for name, weights in state.items()
    }
    assert state.importance["seconds"] > 0 and state.importance["granularity"] == "sequence"
    loku(*workshop.unlearn("loku", folder, *workshop.questions))  # computes its own
    monkeypatch.setattr("loku.cli.unlearn.row_weights", None)  # must not be computed again
    loku(*workshop.unlearn("loku", tmp_path / "given", *workshop.questions, "--importance", file))
    assert same_weights(folder, tmp_path / "given")
    assert results(tmp_path / "given")["importance_seconds"] == state.importance["seconds"]
    assert not (tmp_path / "given" / "importance.safetensors").exists()


def test_evaluate_tofu(workshop, loku, folder, tmp_path):
    words = ["--model", workshop / "phi", "--benchmark", "tofu", "--forget", "forget01", "--data_dir", workshop.root]
    loku("evaluate", *words, "--output_dir", tmp_path / "retain")
    log = tmp_path / "retain" / "eval_log_aggregated.json"
    out = loku("evaluate", *words, "--output_dir", folder, "--retain_log", log, "--definition", "open-unlearning")
    after = results(folder)["after"]
    assert after["forget_quality"] == 1.0 and 0 <= after["model_utility"] <= 1 and "model_utility" in out
    assert len(json.loads(log.read_text())["eval_log_forget.json"]["avg_gt_loss"]) == 3


def test_evaluate_tdec(workshop, loku, folder):
    words = ["--model", workshop / "gpt_neo", "--benchmark", "tdec", "--forget", "tdec[0:4]"]
    loku("evaluate", *words, "--data_dir", workshop.root, "--output_dir", folder)
    assert set(results(folder)["after"]) == {"ma", "el_10"}


def test_evaluate_perplexity_of_several_texts(workshop, loku, folder):
    texts = ["wikitext2:test", str(workshop / "forget.jsonl")]
    loku(
        "evaluate", "--model", workshop / "llama", "--text", *texts, "--data_dir", workshop.root, "--output_dir", folder
    )
    after = results(folder)["after"]
    asked = f"{texts[1]} ROUGE-L"  # of questions
    assert set(after) == {*(f"{text} perplexity" for text in texts), asked}
    loku(*workshop.unlearn("ihl", folder / "run", *workshop.questions, "--max_steps", "1", "--limit", "300"))
    assert after[asked] == pytest.approx(results(folder / "run")["before"]["forget_rouge"])
    ids = AutoTokenizer.from_pretrained(workshop / "llama")((workshop / "wikitext2" / "test.txt").read_text()).input_ids
    model = AutoModelForCausalLM.from_pretrained(workshop / "llama")
    blocks = [ids[i : i + 64] for i in range(0, len(ids), 64)]  # the context, which is shorter than 512
    expected = perplexity(model, [{"input_ids": block, "labels": block} for block in blocks if len(block) > 1])
    assert after["wikitext2:test perplexity"] == pytest.approx(expected)


def test_names_of_texts_are_no_markup(workshop, loku, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c[").mkdir()
    names = ["c[/b].jsonl", "[v2].jsonl"]
    for name in names:
        shutil.copyfile(workshop / "forget.jsonl", name)
    out = loku("evaluate", "--model", workshop / "llama", "--text", *names)
    assert all(f"{name} perplexity" in out for name in names)


def test_unlearn_tdec_stops_when_the_goal_is_reached(workshop, loku, folder, no_plots):
    words = ["--forget", "tdec[0:2]", "--retain", "wikitext2:test", "--data_dir", workshop.root, "--benchmark", "tdec"]
    goal = ["--el_threshold", "1", "--ma_threshold", "1", "--evaluate_every", "1"]  # at once
    loku(*workshop.unlearn("ihl", folder, *words, *goal, "--text", "wikitext2:test", family="gpt_neo"))
    found = results(folder)
    assert found["steps"] == 1 and found["thresholds"] == {"el_10": 1.0, "ma": 1.0}
    assert found["after"].keys() >= {"el_10", "ma", "perplexity", "retain_loss"}
    assert "forget_rouge" not in found["after"]


def test_unlearn_tdec_measures_its_goal_and_always_ends_with_extraction(workshop, loku, folder, no_plots):
    """On unseen sequences, whatever a preset says of the goal."""
    words = ["--forget", "tdec[0:2]", "--data_dir", workshop.root, "--benchmark", "tdec", "--unseen", "tdec[2:5]"]
    words += ["--el_threshold", "0.9", "--ma_threshold", "0.9"]
    loku(*workshop.unlearn("ga", folder, *words, "--learning_rate", "1e-9", "--evaluate_every", "1", family="phi"))
    loku("evaluate", "--model", workshop / "phi", "--benchmark", "tdec", "--forget", "tdec[2:5]", "--data_dir",
         workshop.root, "--output_dir", folder.with_name("unseen"))  # fmt: skip
    found = results(folder)
    assert found["thresholds"] == results(folder.with_name("unseen"))["after"]
    assert found["after"].keys() >= {"el_10", "ma"}


def test_unlearn_tofu_with_a_retain_log(workshop, loku, folder, tmp_path, no_plots):
    evaluate = ["--model", workshop / "phi", "--benchmark", "tofu", "--forget", "forget01", "--data_dir", workshop.root]
    loku("evaluate", *evaluate, "--limit", "1", "--output_dir", tmp_path / "retain")
    words = ["--forget", "forget01", "--retain", "retain99", "--data_dir", workshop.root, "--benchmark", "tofu"]
    words += ["--retain_log", tmp_path / "retain" / "eval_log_aggregated.json", "--limit", "1"]
    loku(*workshop.unlearn("gd+fila", folder, *words, family="phi"))
    before = results(folder)["before"]
    assert before["forget_quality"] == 1.0 and before["log10_forget_quality"] == 0.0 and "model_utility" in before


def test_adapter_is_merged_before_unlearning_and_evaluation(workshop, loku, folder, tmp_path, no_plots):
    """What unlearning starts from, and is measured against, has the memory that the adapter holds."""
    loku(*workshop.unlearn("ihl", tmp_path / "first"))
    adapter = ["--adapter", tmp_path / "first" / "adapter"]
    loku(*workshop.unlearn("kl", folder, *adapter))
    assert results(folder)["before"]["forget_loss"] == pytest.approx(
        results(tmp_path / "first")["after"]["forget_loss"], rel=1e-5
    )


def test_unlearning_from_an_adapter_is_exported_with_it(
    workshop, loku, refused, folder, tmp_path, monkeypatch, no_plots
):
    """The new adapter belongs to the model with the first one merged in, and to no other."""
    base, first = ["--model", workshop / "llama"], tmp_path / "first" / "adapter"
    loku(*workshop.unlearn("gd", tmp_path / "first", "--learning_rate", "1e-1"))
    final = keep_final_logits(monkeypatch)
    loku(*workshop.unlearn("loku", folder, "--adapter", first))
    merged = ["--format", "merged", "--output_dir", tmp_path / "merged"]
    line = refused("export", *base, "--adapter", folder / "adapter", *merged)
    assert f"--adapter {folder / 'adapter'}" in line and f"{first} is not given" in line
    both = [*base, "--adapter", first, folder / "adapter"]
    line = refused("export", *both, "--output_dir", tmp_path / "adapter")
    assert "--format adapter takes one --adapter, but 2 were given" in line and "--format merged writes all" in line
    assert not (tmp_path / "adapter").exists()
    line = refused("export", *both, *merged[:2], "--dtype", "bfloat16", "--output_dir", tmp_path / "rounded")
    assert (
        "the adapters before it were merged in bfloat16" in line and "--dtype the one in its run's config.yaml" in line
    )
    loku("export", *both, *merged)
    with torch.no_grad():
        before, after = (
            AutoModelForCausalLM.from_pretrained(path).eval()(IDS).logits for path in (base[1], tmp_path / "merged")
        )
    assert (after - final[folder.name]).abs().max() < 1e-4 * (before - final[folder.name]).abs().max()


def test_report_compares_runs(workshop, loku, folder, tmp_path, no_plots):
    for method in ("ihl", "gd"):
        loku(*workshop.unlearn(method, tmp_path / method))
    out = loku("report", "--runs", tmp_path / "ihl", tmp_path / "gd", "--output", folder, "--title", "Two <methods>")
    assert "ihl" in out and "gd" in out
    page = (folder / "report.html").read_text()
    assert "Two &lt;methods&gt;" in page and "<svg" in page
    summary = json.loads((folder / "report.json").read_text())
    assert {group["label"] for group in summary["groups"]} == {"ihl", "gd"}
    assert summary["groups"][0]["costs"]["tokens_per_second"]["mean"] > 0


def test_report_takes_evaluations(workshop, loku, refused, folder, tmp_path):
    """And says what it takes where a folder is neither a training's nor an evaluation's."""
    text = ["--text", "wikitext2:test", "--data_dir", workshop.root]
    for family in ("llama", "phi"):
        loku("evaluate", "--model", workshop / family, *text, "--output_dir", tmp_path / family)
    out = loku("report", "--runs", tmp_path / "llama", tmp_path / "phi", "--output", folder)
    assert "Perplexity of wikitext2:test" in out and "llama" in out and "phi" in out
    words = ["importance", "--model", workshop / "llama", *workshop.texts, "--rank", "4"]
    loku(*words, "--output_dir", tmp_path / "rows")
    line = refused("report", "--runs", tmp_path / "rows", "--output", folder)
    assert f"{tmp_path / 'rows'} must be the folder of a training or of an evaluation" in line


def test_demo_of_tiny_size(loku, folder, monkeypatch):
    def generate(*args, **options):
        return [f"[/b]{answer}" for answer in generate_greedily(*args, **options)]

    monkeypatch.setattr("loku.cli.demo.generate_greedily", generate)  # what a model says is no markup
    sizes = ["--people", "3", "--forget", "1", "--memorise_epochs", "2", "--unlearn_epochs", "1"]
    out = loku("demo", "--output_dir", folder, *sizes)
    assert "report.html" in out and "Greedy answers" in out and "[/b]" in out
    for report in (folder / "report", folder / "loku" / "report"):
        assert "<svg" in (report / "report.html").read_text()
    assert {Run.load(folder / method).finished for method in ("target", "loku", "gd")} == {True}


def test_module_runs_as_a_program(tmp_path):
    def run(*words):
        return subprocess.run([sys.executable, "-m", "loku", *words], cwd=tmp_path, capture_output=True, text=True)

    assert run().returncode == 0 and "unlearn" in run("--help").stdout
    done = run("report", "--runs", "nowhere")
    assert done.returncode == 1 and done.stderr.startswith("loku: error: ") and done.stderr.count("\n") == 1


def test_an_evaluation_is_not_overwritten(workshop, loku, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["evaluate", "--model", str(workshop / "llama"), "--text", str(workshop / "forget.jsonl")]
    loku(*words)
    line = refused(*words)
    assert "evaluation holds a run already" in line and "--resume" in line


def test_weights_are_stored_in_the_dtype_asked_for(workshop, loku, tmp_path, no_plots):
    loku(*workshop.unlearn("ihl", tmp_path / "run", "--dtype", "bfloat16"))
    base = ["--model", workshop / "llama", "--dtype", "bfloat16", "--adapter", tmp_path / "run" / "adapter"]
    loku("export", *base, "--format", "merged", "--output_dir", tmp_path / "merged")
    with safe_open(tmp_path / "merged" / "model.safetensors", framework="pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.bfloat16}  # noqa: SIM118
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["dtype"] == "bfloat16"


def test_real_data(loku, tmp_path, no_plots):
    """A new Llama with GPT-2's vocabulary, on TDEC's and TOFU's published files."""
    data = shared_data()
    config = {"model_type": "llama", **CONFIGS["llama"], "hidden_size": 32, "max_position_embeddings": 256}
    (tmp_path / "model.json").write_text(json.dumps(config))
    quick = [*QUICK[: QUICK.index("--rank")], "--data_dir", data]
    loku("finetune", "--model_config", tmp_path / "model.json", "--tokenizer", data / "gpt2_tokenizer", "--train",
         "tdec[0:4]", "forget01[0:4]", "--output_dir", tmp_path / "target", *quick)  # fmt: skip
    model = ["--model", tmp_path / "target" / "model", "--data_dir", data]
    sets = ["--forget", "tdec[0:1]", "--retain", "wikitext2:test[1:2]", "--text", "wikitext2:test[0:1]"]
    loku("unlearn", *model, *sets, *quick, "--limit", "2", "--rank", "4", "--output_dir", tmp_path / "run")
    found = results(tmp_path / "run")
    # A new model finds each of the 50,257 tokens about as likely as the others.
    assert found["before"]["perplexity"] == pytest.approx(50257, rel=0.1) and found["before"] != found["after"]
    tofu = ["--benchmark", "tofu", "--forget", "forget01", "--limit", "1", "--output_dir", tmp_path / "tofu"]
    loku("evaluate", *model, "--adapter", tmp_path / "run" / "adapter", *tofu)
    assert 0 <= results(tmp_path / "tofu")["after"]["model_utility"] <= 1
