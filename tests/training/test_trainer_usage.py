"""The trainer as users of transformers' trainer use it: options, evaluation sets, adapters and data of many kinds."""

from __future__ import annotations

import gc
import json
import weakref
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, TaskType, get_peft_model
from training_setup import causal_lm, sequences, trained_weights, trainer, with_adapter, with_fila
from transformers import TrainerCallback, TrainingArguments

from loku.data import PairedDataset, Role
from loku.training import EvaluationCallback, JsonLinesCallback, UnlearnConfig, UnlearningTrainer

FORGET, RETAIN, PREFERRED = sequences(6, 1), sequences(9, 2), sequences(6, 3)


def make(folder, model=None, **options):
    return trainer(model or with_adapter(causal_lm("llama")), folder, FORGET, RETAIN, PREFERRED, **options)


def logged(done, name):
    return [entry[name] for entry in done.state.log_history if name in entry]


@pytest.mark.parametrize("packing", ["never", "always"])
def test_padding_that_examples_bring_along_is_left_out(tmp_path, packing):
    """On the left, where it would be seen by every token after it."""

    def padded(example):
        extra = 16 - len(example["input_ids"])
        mask = [0] * extra + [1] * len(example["input_ids"])
        return {
            "input_ids": [5] * extra + example["input_ids"],
            "labels": [-100] * extra + example["labels"],
            "attention_mask": mask,
        }

    plain = make(tmp_path, packing=packing)
    data = ([padded(example) for example in part] for part in (FORGET, RETAIN))
    masked = trainer(with_adapter(causal_lm("llama")), tmp_path, *data, packing=packing)
    for done in (plain, masked):
        done.train()
    expected = trained_weights(plain.model)
    assert all(torch.equal(weight, expected[name]) for name, weight in trained_weights(masked.model).items())


def test_virtual_tokens_are_refused(tmp_path):
    config = PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=3)
    prompted = make(tmp_path, get_peft_model(causal_lm("llama"), config))
    with pytest.raises(ValueError, match=r"logits of shape .* as with virtual tokens"):
        prompted.train()


def test_fila_on_an_adapter_that_is_not_active_is_refused(tmp_path):
    model = with_fila(causal_lm("llama"))
    model.add_adapter("plain", LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model.set_adapter("plain")
    with pytest.raises(
        ValueError, match=r"'loku' trains the active adapters \['plain'\], but FILA started \['default'"
    ):
        make(tmp_path, model, method="loku")


@pytest.mark.parametrize("method", ["ihl", "kl"])
@pytest.mark.parametrize("options", [{"target_modules": ["embed_tokens"]}, {"trainable_token_indices": [3, 4]}])
def test_adapters_of_the_embedding_are_packed(tmp_path, method, options):
    done = make(tmp_path, with_adapter(causal_lm("llama"), **options), method=method)
    done.train()
    assert done.data_collator.row_tokens is not None


class _FailOnce(TrainerCallback):
    def __init__(self):
        self.failed = False

    def on_step_end(self, args, state, control, **kwargs):
        if not self.failed and state.global_step == 1:
            self.failed = True
            raise RuntimeError("once")


def test_the_terms_of_the_loss_begin_anew_with_each_training(tmp_path):
    """After one that failed between two logs, and after one that ended there."""
    tried = make(tmp_path, learning_rate=0.0, max_steps=3, logging_steps=2, callbacks=[_FailOnce()])
    with pytest.raises(RuntimeError, match="once"):
        tried.train()
    for _ in range(2):
        tried.train()
        first = next(entry for entry in tried.state.log_history if "forget_loss" in entry)
        assert first["loss"] == pytest.approx(first["forget_loss"] + first["retain_loss"], rel=1e-5)


def test_a_finished_run_loads_its_best_model_again(tmp_path):
    """In the middle of an epoch; best is the highest loss, that of the first checkpoint."""
    pairs = PairedDataset({Role.FORGET: FORGET, Role.RETAIN: RETAIN})
    options = {
        "eval_dataset": pairs, "eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 1, "save_steps": 1,
        "load_best_model_at_end": True, "greater_is_better": True, "max_steps": 4,
    }  # fmt: skip
    done = make(tmp_path, **options)
    done.train()
    assert done.state.best_model_checkpoint.endswith("-1")
    again = make(tmp_path, **options)
    again.train(resume_from_checkpoint=True)
    expected = trained_weights(done.model)
    assert all(torch.equal(weight, expected[name]) for name, weight in trained_weights(again.model).items())


@pytest.mark.parametrize("packing", ["always", "never"])
@pytest.mark.parametrize("pad", [0, 9])
def test_tokens_are_counted_without_padding(tmp_path, packing, pad):
    """Whichever token pads, and also where a sequence has that token in it."""
    forget = [{"input_ids": [pad] * length, "labels": [5] * length} for length in (60, 10, 60, 10)]
    made = trainer(with_adapter(causal_lm("llama")), tmp_path, forget, method="ga", packing=packing, max_steps=2)
    made.args.include_num_input_tokens_seen = "non_padding"
    made.processing_class = SimpleNamespace(pad_token_id=pad)
    made.train()
    assert made.state.num_input_tokens_seen == 140


@pytest.mark.parametrize(("method", "role"), [("npo", Role.RETAIN), ("ga", Role.RETAIN), ("dpo", Role.FORGET)])
def test_evaluation_sets_that_a_method_does_not_score_are_refused(tmp_path, method, role):
    items = [{role: example} for example in FORGET]
    with pytest.raises(ValueError, match=rf"method '{method}' scores .* but was given {role.name.lower()} alone"):
        make(tmp_path, method=method, eval_dataset=items)
    with pytest.raises(ValueError, match=rf"method '{method}' scores .* but was given {role.name.lower()} alone"):
        make(tmp_path, method=method).evaluate(items)


def test_evaluation_sets_of_one_term(tmp_path):
    sets = {"forget": [{Role.FORGET: e} for e in FORGET], "retain": [{Role.RETAIN: e} for e in RETAIN]}
    metrics = make(tmp_path, method="gd", eval_dataset=sets).evaluate()
    assert metrics["eval_forget_loss"] < 0 < metrics["eval_retain_loss"]


def test_evaluation_sequences_may_be_longer_than_those_trained_on(tmp_path):
    model = causal_lm("phi")
    model.config.max_position_embeddings = 512
    longer = [{Role.FORGET: example} for example in sequences(2, 5, 200, 200)]
    assert make(tmp_path, with_adapter(model), method="ga").data_collator.row_tokens == 128
    watched = make(tmp_path, with_adapter(model), method="ga", eval_dataset=longer)
    assert watched.data_collator.row_tokens == 200 and watched.evaluate()["eval_loss"] < 0


def test_evaluation_callbacks_come_late_and_measure_numbers_of_any_kind(tmp_path):
    """The model at the end is measured too, where no interval ends there."""
    metrics = {"tensor": torch.tensor(0.5), "whole": 3, "double": torch.tensor(0.25, dtype=torch.float64).numpy()[()]}
    watched = make(tmp_path, max_steps=3, save_strategy="steps", save_steps=1)
    watched.add_callback(EvaluationCallback(lambda model: metrics, every=2))
    watched.train()
    steps = [entry["step"] for entry in watched.state.log_history if "eval_whole" in entry]
    assert steps == [0, 2, 3]
    assert logged(watched, "eval_tensor") == [0.5] * 3 and logged(watched, "eval_double") == [0.25] * 3


def test_what_was_measured_at_the_end_is_not_measured_again(tmp_path):
    watched = make(tmp_path, max_steps=4, callbacks=[EvaluationCallback(lambda model: {"whole": 1}, every=2)])
    watched.train()
    assert [entry["step"] for entry in watched.state.log_history if "eval_whole" in entry] == [0, 2, 4]


def test_a_finished_run_is_not_measured_again(tmp_path):
    def run(resume=None):
        callbacks = [EvaluationCallback(lambda model: {"whole": 1}, every=2), JsonLinesCallback(tmp_path / "log.jsonl")]
        options = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1, "callbacks": callbacks}
        make(tmp_path, **options).train(resume_from_checkpoint=resume)
        return (tmp_path / "log.jsonl").read_text()

    assert [json.loads(line)["step"] for line in run().splitlines() if "eval_whole" in line] == [0, 2, 3]
    assert run(resume=True).count("eval_whole") == 3


def test_a_trainer_is_freed_with_its_last_name(tmp_path):
    done = make(tmp_path, max_steps=1)
    done.train()
    seen = weakref.ref(done)
    gc.disable()
    try:
        del done
        assert seen() is None
    finally:
        gc.enable()


@pytest.mark.parametrize(
    ("example", "message"),
    [
        ({"input_ids": [1, 2, 3], "labels": [-100] * 3}, "nothing to score in its 3 tokens"),
        ({"input_ids": [], "labels": []}, "nothing to score in its 0 tokens"),
        ({"input_ids": [1, 2]}, r"an example has input_ids and labels, but this has \['input_ids'\]"),
        ({"input_ids": [1, 2, 3], "labels": [1, 2]}, "2 labels for 3 input_ids"),
        (
            {"input_ids": [1, 2], "labels": [1, 2], "attention_mask": [1]},
            "attention_mask has 1 entries for 2 input_ids",
        ),
    ],
)
def test_examples_that_do_not_serve_are_named_before_training(tmp_path, example, message):
    with pytest.raises(ValueError, match=f"forget_dataset, sequence 6: {message}"):
        trainer(with_adapter(causal_lm("llama")), tmp_path, [*FORGET, example], RETAIN)


def test_what_is_not_served_is_named(tmp_path):
    base = causal_lm("llama")
    for name in ("compute_loss_func", "compute_metrics", "preprocess_logits_for_metrics", "model_init"):
        with pytest.raises(TypeError, match=f"{name} is not served"):
            UnlearningTrainer(base, UnlearnConfig(str(tmp_path), use_cpu=True), FORGET, RETAIN, **{name: print})
    with pytest.raises(TypeError, match="args must be an UnlearnConfig, got TrainingArguments"):
        UnlearningTrainer(base, TrainingArguments(str(tmp_path), use_cpu=True), FORGET, RETAIN)
    with pytest.raises(TypeError, match="forget_dataset must have a length, got generator"):
        trainer(base, tmp_path, (example for example in FORGET), RETAIN)
    with pytest.raises(ValueError, match=r"item 0 must be {Role: Example}, .* has \['input_ids', 'labels'\]"):
        make(tmp_path, eval_dataset=FORGET)
    with pytest.raises(ValueError, match=r"dataloader_drop_last would leave nothing .* processes have 999"):
        make(tmp_path, dataloader_drop_last=True, per_device_train_batch_size=999)
    frozen = with_adapter(base)
    frozen.requires_grad_(False)
    with pytest.raises(ValueError, match="model has no trainable parameter"):
        make(tmp_path, frozen).train()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "npo", "beta": float("inf")}, "beta must be positive and finite, got inf"),
        ({"method": "simnpo", "gamma": float("nan")}, "gamma must be finite, got nan"),
        ({"method": "ihl", "retain_weight": float("inf")}, "retain_weight must be finite and at least 0, got inf"),
        ({"accelerator_config": {"dispatch_batches": True}}, "dispatch_batches in accelerator_config must not be True"),
        ({"accelerator_config": {"even_batches": False}}, "even_batches in accelerator_config must not be False"),
    ],
)
def test_settings_that_would_train_something_else(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        UnlearnConfig(str(tmp_path), use_cpu=True, **options)
