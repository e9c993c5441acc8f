"""Options from the command line, from YAML files, from presets, and from a run's own config.yaml."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import pytest
import torch
import yaml
from cli_setup import same_weights
from peft import get_peft_model
from transformers import AutoModelForCausalLM, GPT2Config, MambaConfig, OPTConfig

import loku.cli.unlearn as unlearn_command
from loku.cli import COMMANDS, main
from loku.cli.benchmarks import BenchmarkOptions
from loku.cli.errors import CommandError
from loku.cli.evaluate import EvaluateRun
from loku.cli.finetune import FinetuneRun
from loku.cli.importance import ImportanceRun
from loku.cli.models import load_tokenizer, lora_config, target_modules
from loku.cli.options import (
    AdapterOptions,
    DataOptions,
    ImportanceOptions,
    ModelOptions,
    _preset,
    as_dict,
    option,
    parse,
    preset_names,
)
from loku.cli.settings_files import dump, parsed
from loku.training import UnlearnConfig

UNLEARN = [
    ModelOptions, DataOptions, AdapterOptions, ImportanceOptions, BenchmarkOptions, unlearn_command.UnlearnRun,
    UnlearnConfig,
]  # fmt: skip
OPTIONS = {
    "unlearn": UNLEARN,
    "finetune": [ModelOptions, DataOptions, FinetuneRun, UnlearnConfig],
    "importance": [ModelOptions, DataOptions, AdapterOptions, ImportanceOptions, ImportanceRun],
    "evaluate": [ModelOptions, DataOptions, EvaluateRun],
}
CPU = ["--use_cpu", "--output_dir", "somewhere"]
RANKS = {"tofu": 32, "tdec": 16}


@dataclass
class Sizes:
    rank: int = option(16, "a number")
    alpha: float | None = option(None, "another")
    train: list[str] | None = option(None, "several")
    resume: bool = option(False, "a switch")
    output_dir: str = option("out", "a folder")


def sizes(*words: object, **fixed) -> Sizes:
    return parse("test", [Sizes], [str(word) for word in words], "A test.", **fixed)[0]


@pytest.fixture
def yaml_file(tmp_path):
    def write(text: str):
        path = tmp_path / "options.yaml"
        path.write_text(text)
        return path

    return write


def test_config_gives_defaults_that_the_command_line_overrides(yaml_file):
    path = yaml_file("rank: 8\nalpha: 1e-3\ntrain: [a, b]\nresume: true\n")
    assert sizes("--config", path) == Sizes(8, 1e-3, ["a", "b"], True)  # 1e-3 is a string to YAML
    assert sizes("--config", path, "--rank", 4, "--train", "c", "--resume", "false") == Sizes(4, 1e-3, ["c"], False)


def test_words_that_yaml_takes_for_booleans(yaml_file):
    path = yaml_file("save_strategy: no\nsave_only_model: yes\nmodel: off\nlog_on_each_node: off\n")
    model, config = parse("test", [ModelOptions, UnlearnConfig], ["--config", str(path), *CPU], "A test.")
    assert config.save_strategy == "no" and model.model == "off"  # words where words are meant,
    assert config.save_only_model is True and config.log_on_each_node is False  # and switches where switches are
    with pytest.raises(CommandError, match="invalid choice: 'false'"):
        parse("test", [UnlearnConfig], ["--config", str(yaml_file("save_strategy: false\n")), *CPU], "A test.")


def test_numbers_as_json_and_python_write_them(yaml_file):
    """Inside of a mapping too, where YAML would take 1e-5 for a word; and 0123 is 83 to it, and no folder's name."""
    path = yaml_file("lr_scheduler_kwargs: {min_lr: 1e-5}\nrun_name: 0123\ndata_seed: 1e1\nlearning_rate: 2E-5\n")
    with pytest.raises(CommandError, match="data-seed: invalid int value: '1e1'"):
        parse("test", [UnlearnConfig], ["--config", str(path), *CPU], "A test.")
    path.write_text(path.read_text().replace("1e1", "10"))
    (config,) = parse("test", [UnlearnConfig], ["--config", str(path), *CPU], "A test.")
    assert config.lr_scheduler_kwargs == {"min_lr": 1e-5} and config.learning_rate == 2e-5
    assert config.run_name == "0123" and config.data_seed == 10
    path.write_text('{\n\t"rank": 8,\n\t"alpha": 1,\n\t"output_dir": 12\n}\n')  # YAML has no tabs
    assert sizes("--config", path) == Sizes(8, 1.0, output_dir="12")


@pytest.mark.parametrize("word", ["1e5", "1.5e5", "-2.E+3", ".5e3", "1", "0123", "no", "2026-11-27", "1_000"])
def test_words_that_look_like_numbers_survive(word, tmp_path):
    """Written to a run's config.yaml, they come back as words."""
    path = tmp_path / "options.yaml"
    path.write_text(dump({"train": [word], "output_dir": word}))
    assert sizes("--config", path) == Sizes(train=[word], output_dir=word)


@pytest.mark.parametrize("number", ["1e5", "1.5e5", "-2.E+3", ".5e3"])
def test_numbers_with_exponents(number):
    assert parsed(f"rope: {{theta: {number}}}")[0] == {"rope": {"theta": float(number)}}


def test_config_comes_before_preset(yaml_file):
    path = yaml_file("rank: 8\n")
    words = ["--preset", "phi-1.5b", "--config", str(path)]
    _, adapter, config = parse("test", [ModelOptions, AdapterOptions, UnlearnConfig], [*words, *CPU], "A test.")
    assert adapter.rank == 8 and config.learning_rate == 2e-4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rnak: 8\n", "there is no option 'rnak'; did you mean 'rank'?"),
        ("- rank\n", "must hold a mapping, but holds a list"),
        ("rank: [1, 2]\n", "rank must be a single value"),
        ("train: [a, 2]\n", "train must be a list of text"),
        ("rank: 1.5\n", "--rank: invalid int value: '1.5'"),
        ("resume: perhaps\n", "Truthy value expected"),
        ("rank: {\n", "not valid YAML"),
        ("", "holds a NoneType"),
    ],
)
def test_config_that_is_none(yaml_file, text, message):
    with pytest.raises(CommandError) as error:
        sizes("--config", yaml_file(text))
    assert message in str(error.value)


def test_unknown_option_is_named_with_the_one_meant():
    with pytest.raises(CommandError, match=r"there is no option '--rnak'; did you mean '--rank'\?"):
        sizes("--rnak=3")
    with pytest.raises(CommandError, match=r"there is no option 'zzzzz'$"):
        sizes("zzzzz")
    with pytest.raises(CommandError, match="there is no option '--ran'; did you mean '--rank'"):  # no abbreviations
        sizes("--ran", 3)


def test_preset_that_does_not_exist_lists_those_that_do():
    with pytest.raises(CommandError, match=r"gpt-neo-125m, .*, phi-1.5b, but is 'llama'"):
        sizes("--preset", "llama")


def test_what_the_command_decides_cannot_be_given():
    assert sizes(rank=3).rank == 3
    with pytest.raises(CommandError, match="--rank is 3 in loku test, but 4 was given"):
        sizes("--rank", 4, rank=3)


def test_resume_takes_what_the_run_was_told(tmp_path):
    (tmp_path / "config.yaml").write_text("rank: 5\nalpha: 2.0\ntrain: [a]\n")
    assert sizes("--output_dir", tmp_path) == Sizes(output_dir=str(tmp_path))
    given = sizes("--output_dir", tmp_path, "--resume", "--alpha", 3)
    assert given == Sizes(5, 3.0, ["a"], True, str(tmp_path))


@pytest.mark.parametrize("preset", preset_names())
@pytest.mark.parametrize("command", OPTIONS)
def test_presets_parse_for_every_command(command, preset):
    words = CPU if "use_cpu" in {f.name for of in OPTIONS[command] for f in dataclasses.fields(of)} else []
    found = as_dict(*parse(command, OPTIONS[command], ["--preset", preset, *words], "A test."))
    assert found["model"].count("/") == 1
    if command == "unlearn":
        assert found["method"] == "loku" and found["rank"] == RANKS[found["benchmark"]] and found["bf16"]


def test_options_of_another_benchmark_are_unused(capsys):
    words = ["--preset", "gpt-neo-125m", *CPU]
    parse("unlearn", UNLEARN, [*words, "--unseen", "tdec[32:64]"], "A test.")
    assert capsys.readouterr().err == ""
    parse("unlearn", UNLEARN, [*words, "--benchmark", "tofu", "--retain_log", "log.json"], "A test.")
    assert capsys.readouterr().err.splitlines() == [
        f"loku: warning: --{name} is for --benchmark tdec, and has no effect with tofu"
        for name in ("el_threshold", "ma_threshold")
    ]
    parse("evaluate", OPTIONS["evaluate"], ["--retain_log", "log.json", "--forget", "forget01"], "A test.")
    assert capsys.readouterr().err.splitlines() == [
        "loku: warning: --forget is for --benchmark tofu and tdec, and has no effect with perplexity",
        "loku: warning: --retain_log is for --benchmark tofu, and has no effect with perplexity",
    ]
    tdec = ["--benchmark", "tdec", "--forget", "tdec[0:32]", "--text", "wikitext2:test"]
    parse("evaluate", OPTIONS["evaluate"], [*tdec, "--definition", "open-unlearning"], "A test.")
    assert capsys.readouterr().err.splitlines() == [
        "loku: warning: --definition is for --benchmark tofu, and has no effect with tdec",
        "loku: warning: --text is for --benchmark perplexity, and has no effect with tdec",
    ]


@pytest.mark.parametrize(("preset", "finetune", "unlearn"), [("llama2-7b", 1e-5, 1e-4), ("phi-1.5b", 2e-5, 2e-4)])
def test_presets_have_learning_rates_for_each_command(preset, finetune, unlearn):
    for command, learning_rate in (("finetune", finetune), ("unlearn", unlearn)):
        found = as_dict(*parse(command, OPTIONS[command], ["--preset", preset, *CPU], "A test."))
        assert found["learning_rate"] == learning_rate and found["num_train_epochs"] == 5


def test_keys_of_presets_are_options_of_some_command():
    known = {command: {f.name for of in types for f in dataclasses.fields(of)} for command, types in OPTIONS.items()}
    for preset in preset_names():
        settings = _preset(preset)
        sections = {command: settings.pop(command) for command in OPTIONS if command in settings}
        assert set(settings) <= set().union(*known.values())
        assert all(set(section) <= known[command] for command, section in sections.items())


def test_config_of_a_run_gives_the_same_run_again(workshop, loku, folder, tmp_path, no_plots):
    """All of its keys are options, with the values that were used."""
    scheduler = ["--lr_scheduler_type", "cosine_with_min_lr", "--lr_scheduler_kwargs", '{"min_lr": 1e-4}']
    loku(*workshop.unlearn("npo", folder, *scheduler, "--beta", "0.3"))
    config = folder / "config.yaml"
    told = yaml.safe_load(config.read_text())
    assert told["beta"] == 0.3 and told["lr_scheduler_kwargs"] == {"min_lr": 1e-4} and told["rank"] == 4
    loku("unlearn", "--config", config, "--output_dir", tmp_path / "again")
    assert same_weights(folder, tmp_path / "again")
    again = yaml.safe_load((tmp_path / "again" / "config.yaml").read_text())
    differing = {key for key in told | again if told.get(key) != again.get(key)}
    assert differing <= {"output_dir", "logging_dir", "run_name"}


@pytest.mark.parametrize("command", COMMANDS)
def test_help(command, capsys):
    with pytest.raises(SystemExit) as left:
        main([command, "--help"])
    assert left.value.code == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"usage: loku {command} [") and "--config" in printed
    if command == "unlearn":
        assert printed.index("--rank") < printed.index("--learning_rate")  # ours, before transformers' many


def test_help_lists_the_commands(capsys):
    for words in ([], ["--help"]):
        assert main(words) == 0
        printed = capsys.readouterr().out
        assert all(f"\n  {command} " in printed for command in COMMANDS)


def test_unknown_command(capsys):
    assert main(["unlern"]) == 2
    assert "there is no command 'unlern'" in capsys.readouterr().err


ATTENTION = {"q_proj", "k_proj", "v_proj"}
TARGETS = {
    family: {"attn": attn, "mlp": mlp, "all": attn | mlp, "q_proj,v_proj": {"q_proj", "v_proj"}}
    for family, attn, mlp in (
        ("gpt_neo", ATTENTION | {"out_proj"}, {"c_fc", "c_proj"}),
        ("phi", ATTENTION | {"dense"}, {"fc1", "fc2"}),
        ("llama", ATTENTION | {"o_proj"}, {"gate_proj", "up_proj", "down_proj"}),
    )
}


@pytest.mark.parametrize("family", TARGETS)
@pytest.mark.parametrize("targets", ["attn", "mlp", "all", "q_proj,v_proj"])
def test_targets(workshop, family, targets):
    model = AutoModelForCausalLM.from_pretrained(workshop / family)
    config = lora_config(model, AdapterOptions(rank=4, targets=targets))
    assert config.target_modules == TARGETS[family][targets] and (config.r, config.lora_alpha) == (4, 8)
    adapted = get_peft_model(model, config)
    head = adapted.get_output_embeddings()
    assert isinstance(head, torch.nn.Linear)  # never an adapter


def test_the_head_is_a_target_where_it_is_named(workshop):
    model = AutoModelForCausalLM.from_pretrained(workshop / "llama")
    adapted = get_peft_model(model, lora_config(model, AdapterOptions(rank=4, targets="q_proj, lm_head")))
    names = {name for name, module in adapted.get_base_model().named_modules() if hasattr(module, "lora_A")}
    assert names == {"lm_head", *(f"model.layers.{i}.self_attn.q_proj" for i in range(2))}


OPT = {"ffn_dim": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 32, "word_embed_proj_dim": 16}


@pytest.mark.parametrize(
    ("config", "attn", "mlp"),
    [
        (OPTConfig(vocab_size=20, **OPT), ATTENTION | {"out_proj"}, {"fc1", "fc2"}),  # not project_in and project_out
        (
            GPT2Config(vocab_size=20, n_embd=32, n_layer=1, n_head=2),
            {"attn.c_attn", "attn.c_proj"},
            {"mlp.c_fc", "mlp.c_proj"},
        ),
    ],
)
def test_targets_of_models_with_other_blocks(config, attn, mlp):
    model = AutoModelForCausalLM.from_config(config)
    assert set(target_modules(model, "attn")) == attn and set(target_modules(model, "mlp")) == mlp


def test_no_mlp_beside_no_attention():
    config = MambaConfig(vocab_size=20, hidden_size=32, num_hidden_layers=1, state_size=4)
    with pytest.raises(CommandError, match="--targets 'mlp' names no linear layer"):
        target_modules(AutoModelForCausalLM.from_config(config), "mlp")


@pytest.mark.parametrize("command", ["demo", "evaluate", "export", "report"])
def test_commands_of_one_process_refuse_to_run_in_several(capsys, monkeypatch, command):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main([command]) == 2
    assert f"loku {command} runs in one process" in capsys.readouterr().err


def test_a_tokenizer_of_vocabulary_and_merges_alone(tmp_path):
    """As GPT-2's is published, without a file that says which class it is."""
    (tmp_path / "vocab.json").write_text('{"<|endoftext|>": 0, "a": 1, "b": 2, "ab": 3}')
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n")
    tokenizer = load_tokenizer(ModelOptions(tokenizer=str(tmp_path)))
    assert tokenizer("abba")["input_ids"] == [3, 2, 1]
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 0
