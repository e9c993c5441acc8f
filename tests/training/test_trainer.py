"""The trainer: what is minimised does not hang on how batches are laid out, split or interrupted."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from training_setup import causal_lm, sequences, trained_weights, trainer, with_adapter, with_fila
from transformers import BloomConfig, BloomForCausalLM, TrainerCallback

from loku.data import PairedDataset, Role
from loku.fila import load_fila_adapter
from loku.training import Scorer, UnlearnConfig, UnlearningTrainer

FORGET, RETAIN, PREFERRED = sequences(6, 1), sequences(9, 2), sequences(6, 3)
DATA = (FORGET, RETAIN, PREFERRED)
STARTS = {"loku": with_fila, "ihl": with_adapter}


def assert_same(one, other, relative=0.0):
    assert one.keys() == other.keys() and one
    for name, weight in one.items():
        assert (other[name] - weight).abs().max() <= relative * weight.abs().max(), name


def run(model, folder, data=DATA, **options):
    done = trainer(model, folder, *data, **options)
    done.train()
    return done


@pytest.mark.parametrize("method", ["ihl", "npo", "dpo", "kl"])
@pytest.mark.parametrize("family", ["llama", "phi"])
def test_packed_equals_padded(tmp_path, family, method):
    base = causal_lm(family, torch.float64)
    options = {"method": method, "retain_weight": 0.5, "max_steps": 3}
    padded = run(with_adapter(base), tmp_path, packing="never", **options)
    packed = run(with_adapter(base), tmp_path, packing="always", row_tokens=40, **options)
    assert padded.data_collator.row_tokens is None and packed.data_collator.row_tokens == 40
    assert_same(trained_weights(padded.model), trained_weights(packed.model), 1e-8)
    assert packed.state.log_history[0]["loss"] == pytest.approx(padded.state.log_history[0]["loss"], rel=1e-9)


@pytest.mark.parametrize("method", ["ihl", "simnpo", "finetune"])
def test_accumulation_does_not_change_the_loss(tmp_path, method):
    """Sequences of 4 to 60 tokens, so that a mean of the micro-batches' means would be far off."""
    uneven = [*sequences(3, 1), *sequences(3, 4, 50, 60)], [*sequences(5, 2), *sequences(4, 5, 50, 60)]
    base = causal_lm("llama", torch.float64)
    options = {"method": method, "retain_weight": 0.5, "max_steps": 4, "per_device_train_batch_size": 3}
    whole = run(with_adapter(base), tmp_path, uneven, **options)
    split = {**options, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 3}
    parts = run(with_adapter(base), tmp_path, uneven, **split)
    assert_same(trained_weights(whole.model), trained_weights(parts.model), 1e-8)
    for one, other in zip(whole.state.log_history[:4], parts.state.log_history[:4], strict=True):
        losses = {name: value for name, value in one.items() if "loss" in name}
        assert {name: other[name] for name in losses} == pytest.approx(losses, rel=1e-6)


def test_the_log_has_the_terms_of_the_loss(tmp_path):
    """Means over the steps since the last log."""
    options = {"method": "gd", "retain_weight": 0.25, "learning_rate": 0.0, "per_device_train_batch_size": 3}
    done = run(with_adapter(causal_lm("llama")), tmp_path, logging_steps=2, max_steps=4, **options)
    logs = [entry for entry in done.state.log_history if "loss" in entry]
    assert [entry["step"] for entry in logs] == [2, 4]
    for entry in logs:
        assert entry["loss"] == pytest.approx(entry["forget_loss"] + 0.25 * entry["retain_loss"], rel=1e-5)
    # Two steps of three items are one pass over the six forget sequences, whatever the order.
    assert logs[0]["forget_loss"] == pytest.approx(logs[1]["forget_loss"], rel=0.2) and logs[0]["forget_loss"] < 0


class _Kill(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize("method", STARTS)
@pytest.mark.parametrize("killed_at", [3, 5])
def test_killed_and_resumed_ends_at_the_same_weights(tmp_path, method, killed_at):
    """Bit for bit, with dropout, at the middle of an epoch and at its end, with a new adapter each time."""
    base = causal_lm("llama")
    options = {
        "method": method, "max_steps": 7, "save_strategy": "steps", "save_steps": 1, "lr_scheduler_type": "linear",
    }  # fmt: skip
    whole = run(STARTS[method](base, lora_dropout=0.2), tmp_path / "whole", **options)
    start = STARTS[method](base, lora_dropout=0.2)
    with pytest.raises(KeyboardInterrupt):
        run(start, tmp_path / "parts", callbacks=[_Kill(killed_at)], **options)
    torch.manual_seed(99)  # nothing may hang on what was drawn before
    resumed = trainer(STARTS[method](base, lora_dropout=0.2), tmp_path / "parts", *DATA, **options)
    torch.manual_seed(98)
    resumed.train(resume_from_checkpoint=True)
    assert_same(trained_weights(whole.model), trained_weights(resumed.model))
    assert resumed.state.log_history[0]["step"] == 1 and resumed.state.global_step == 7
    untrained = trained_weights(STARTS[method](base))
    assert all((weight - untrained[name]).abs().max() > 0.01 for name, weight in trained_weights(resumed.model).items())


def test_retain_sequences_are_drawn_anew_each_epoch_after_resuming_too(tmp_path):
    """accelerate's loaders do not tell the data set of a resumed epoch."""
    seen = []

    class Watched(PairedDataset):
        def __getitem__(self, index):
            item = super().__getitem__(index)
            seen.append((self.epoch, index, self._index(Role.RETAIN, index)))
            return item

    def watch(folder, resume=None):
        seen.clear()
        watched = trainer(with_adapter(causal_lm("llama")), folder, FORGET, RETAIN, save_strategy="steps", save_steps=1,
                          max_steps=8)  # fmt: skip
        watched.train_dataset.__class__ = Watched
        watched.train(resume_from_checkpoint=resume)
        return list(seen)

    whole = watch(tmp_path)
    assert {epoch for epoch, _, _ in whole} == {0, 1, 2}
    pairs = {epoch: {(i, r) for e, i, r in whole if e == epoch} for epoch in (0, 1)}
    assert len(pairs[0]) == 6 and pairs[0] != pairs[1]
    resumed = watch(tmp_path, str(tmp_path / "checkpoint-4"))
    assert resumed == whole[8:]


def test_the_data_seed_draws_the_retain_sequences(tmp_path):
    """Which is the seed, unless it is given."""

    def drawn(**options):
        pairs = trainer(with_adapter(causal_lm("llama")), tmp_path, FORGET, RETAIN, **options).train_dataset
        return [pairs[i][Role.RETAIN] for i in range(len(FORGET))]

    assert drawn(data_seed=1) == drawn(data_seed=1, seed=4) == drawn(seed=1)
    assert drawn(data_seed=1) != drawn(data_seed=2)


@pytest.mark.parametrize("method", STARTS)
def test_checkpoints_load_on_the_unmodified_base(tmp_path, method):
    base = causal_lm("llama")
    done = run(STARTS[method](base), tmp_path, method=method, save_strategy="steps", save_steps=4)
    ids = torch.tensor([FORGET[0]["input_ids"]])
    with torch.no_grad():
        expected, before = done.model.eval()(ids).logits, base(ids).logits
        plain = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "checkpoint-4").eval()(ids).logits
    torch.testing.assert_close(plain, expected, rtol=0, atol=1e-5)
    assert (plain - before).abs().max() > 0.1
    if method == "loku":
        again = load_fila_adapter(copy.deepcopy(base), tmp_path / "checkpoint-4").eval()
        with torch.no_grad():
            assert torch.equal(again(ids).logits, expected)


@pytest.mark.parametrize("method", ["npo", "kl"])
def test_the_reference_is_the_base_under_fila(tmp_path, method):
    """At step 0, with the residual base: the reference equals the model, so NPO is 2/beta log 2 and KL is 0."""
    model = with_fila(causal_lm("llama"))
    done = run(model, tmp_path, method=method, learning_rate=1e-6, max_steps=2)
    first = done.state.log_history[0]
    if method == "npo":
        assert first["loss"] == pytest.approx(2 / 0.1 * torch.tensor(2.0).log().item(), rel=1e-4)
    else:
        assert abs(first["retain_loss"]) < 1e-5


def test_the_reference_knows_no_dropout(tmp_path):
    """Nor does it draw random numbers; the model goes on training."""
    base = causal_lm("llama")
    base.config.attention_dropout = 0.5
    for layer in base.model.layers:
        layer.self_attn.attention_dropout = 0.5
    model = with_adapter(base).train()
    made = trainer(model, tmp_path, *DATA, method="npo")
    batch = made.data_collator([made.train_dataset[i] for i in range(4)])
    state = torch.get_rng_state()
    reference = made._reference(model, batch).log_probabilities()
    assert torch.equal(torch.get_rng_state(), state) and all(module.training for module in model.modules())
    expected = Scorer(base)(base.eval(), batch).log_probabilities()
    torch.testing.assert_close(reference, expected, rtol=1e-5, atol=1e-5)
    assert (made.scorer(model, batch).log_probabilities() - expected).abs().max() > 0.1


def test_what_was_frozen_stays_frozen_beside_a_reference(tmp_path):
    model = with_adapter(causal_lm("llama"))
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)
    frozen = {name: p.clone() for name, p in model.named_parameters() if "lora_B" not in name}
    done = run(model, tmp_path, method="npo")
    assert all("lora_B" in name for name in trained_weights(done.model))
    after = dict(done.model.named_parameters())
    assert all(torch.equal(after[name], weight) for name, weight in frozen.items())


def test_gradient_checkpointing_changes_nothing(tmp_path):
    base = causal_lm("llama", torch.float64)
    plain = run(with_adapter(base), tmp_path)
    checkpointed = run(with_adapter(base), tmp_path, gradient_checkpointing=True)
    assert_same(trained_weights(plain.model), trained_weights(checkpointed.model), 1e-10)


@pytest.mark.parametrize("method", ["ihl", "kl"])
def test_bf16(tmp_path, method):
    """Autocast: the head is taken over in it, and the first losses are near those in float32."""
    base = causal_lm("phi")
    single = run(with_adapter(base), tmp_path, method=method)
    mixed = run(with_adapter(base), tmp_path, method=method, bf16=True)
    assert mixed.scorer.refusal is None
    first, other = single.state.log_history[0], mixed.state.log_history[0]
    assert first["loss"] != other["loss"] and other["loss"] == pytest.approx(first["loss"], rel=0.02)
    assert all(weight.dtype == torch.float32 for weight in trained_weights(mixed.model).values())


def test_finetuning_a_whole_model_with_tied_embeddings(tmp_path):
    """Weights of the base and the head are trained, and stay one tensor."""
    done = run(causal_lm("gpt_neo"), tmp_path, (None, RETAIN), method="finetune", max_steps=20, learning_rate=0.003)
    losses = [entry["loss"] for entry in done.state.log_history if "loss" in entry]
    assert done.scorer.refusal is None and sum(losses[-4:]) < 0.7 * sum(losses[:4])
    assert done.model.lm_head.weight is done.model.transformer.wte.weight


def test_evaluation_loss(tmp_path):
    pairs = PairedDataset({Role.FORGET: FORGET, Role.RETAIN: RETAIN})
    model = with_adapter(causal_lm("llama"))
    watched = trainer(model, tmp_path, FORGET, RETAIN, per_device_eval_batch_size=6, eval_dataset=pairs)
    metrics = watched.evaluate()
    expected = watched.compute_loss(model.eval(), watched.data_collator([pairs[i] for i in range(6)]))
    assert metrics["eval_loss"] == pytest.approx(expected.item(), rel=1e-5)


MISSING = [
    ("loku", (None, RETAIN), r"forget_dataset is missing, and method 'loku' needs it"),
    ("ihl", (FORGET, None), r"retain_dataset is missing, and method 'ihl' needs it \(its retain_weight is 1\)"),
    ("gd", (FORGET, []), r"retain_dataset is empty, and method 'gd' needs it"),
    ("dpo", (FORGET, RETAIN, None), r"preferred_dataset is missing, and method 'dpo' needs it"),
    ("dpo", (FORGET, RETAIN, PREFERRED[:4]), r"a preferred sequence for each forget sequence, got 4 for 6"),
    ("finetune", (FORGET, None), r"retain_dataset is missing, and method 'finetune' needs it"),
    ("ga", ([*FORGET, *sequences(1, 1, 65, 65)],), r"forget_dataset has a sequence of 65 tokens, but .* context is 64"),
]


@pytest.mark.parametrize(("method", "data", "message"), MISSING)
def test_data_that_do_not_serve(tmp_path, method, data, message):
    with pytest.raises(ValueError, match=message):
        trainer(with_fila(causal_lm("llama")), tmp_path, *data, method=method)


def test_models_that_do_not_serve(tmp_path):
    base = causal_lm("llama")
    with pytest.raises(ValueError, match=r"method 'npo' compares .* must be a PeftModel, got LlamaForCausalLM"):
        trainer(base, tmp_path, *DATA, method="npo")
    biased = with_adapter(causal_lm("phi"), bias="lora_only")
    unfrozen = with_adapter(causal_lm("llama"))
    unfrozen.get_base_model().model.norm.requires_grad_(True)
    with pytest.raises(ValueError, match=r"method 'dpo' compares .*model\.norm\.weight of the base is trained too"):
        trainer(unfrozen, tmp_path, FORGET, RETAIN, FORGET, method="dpo")
    stacked = with_adapter(causal_lm("llama"))
    stacked.add_adapter("new", stacked.peft_config["default"])
    stacked.base_model.set_adapter(["default", "new"])
    for name, parameter in stacked.named_parameters():
        parameter.requires_grad_(".new." in name)
    with pytest.raises(
        ValueError, match=r"method 'npo' compares .* lacks 'default' too, which is active and not trained"
    ):
        trainer(stacked, tmp_path, FORGET, method="npo")
    for parameter in stacked.parameters():
        parameter.requires_grad_(False)
    assert trainer(stacked, tmp_path, FORGET, method="npo").method.reference  # to evaluate, or told of when it trains
    for options in ({"modules_to_save": ["norm"]}, {"trainable_token_indices": [1, 2]}, {"use_dora": True}):
        kept = with_adapter(causal_lm("llama"), **options)  # copies, which are off with the adapter
        assert trainer(kept, tmp_path, FORGET, method="npo").method.reference
    named = get_peft_model(causal_lm("llama"), LoraConfig(r=2, target_modules=["q_proj"]), adapter_name="norm")
    named.get_base_model().model.norm.requires_grad_(True)
    with pytest.raises(ValueError, match=r"norm\.weight of the base is trained too"):
        trainer(named, tmp_path, FORGET, method="npo")
    with pytest.raises(ValueError, match=r"method 'kl' compares .* bias='lora_only' .* set it to 'none'"):
        trainer(biased, tmp_path, *DATA, method="kl")
    for model in (base, with_adapter(base)):
        with pytest.raises(ValueError, match=r"method 'loku' needs an adapter started by .* without FILA it is 'ihl'"):
            trainer(model, tmp_path, *DATA, method="loku")
    bloom = BloomForCausalLM(BloomConfig(vocab_size=61, hidden_size=32, n_layer=2, n_head=2))  # has no position ids
    with pytest.raises(ValueError, match=r"packing='always', but BloomForCausalLM does not keep packed sequences"):
        trainer(bloom, tmp_path, *DATA, packing="always")
    assert trainer(bloom, tmp_path, *DATA).data_collator.row_tokens is None
    assert trainer(base, tmp_path, *DATA).data_collator.row_tokens == 64  # its context
    for tokens in (10, 65):
        with pytest.raises(ValueError, match=rf"row_tokens must be at least 14, .* and at most 64, .* got {tokens}"):
            trainer(base, tmp_path, *DATA, row_tokens=tokens)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "unlearn"}, "method must be one of loku, ihl"),
        ({"method": "ihl", "beta": 0.1}, "method 'ihl' has no option 'beta'"),
        ({"packing": "maybe"}, "packing must be one of auto, always, never, got 'maybe'"),
        ({"row_tokens": 0}, "row_tokens must be positive or None, got 0"),
        ({"remove_unused_columns": True}, "remove_unused_columns must be False"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor must be 0, got 0.1"),
        ({"train_sampling_strategy": "group_by_length"}, "train_sampling_strategy must be.*'group_by_length'"),
        ({"dataloader_persistent_workers": True, "dataloader_num_workers": 1}, "dataloader_persistent_workers must"),
    ],
)
def test_settings_that_do_not_serve(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        UnlearnConfig(str(tmp_path), use_cpu=True, **options)


def test_settings_survive_as_json(tmp_path):
    args = UnlearnConfig(str(tmp_path), use_cpu=True, method="npo", beta=0.3, seed=5)
    stored = json.loads(args.to_json_string())
    assert (stored["method"], stored["beta"], stored["data_seed"]) == ("npo", 0.3, 5)
    assert args.unlearning_method().beta == 0.3 and UnlearningTrainer.loss_is_scaled_for_ga
