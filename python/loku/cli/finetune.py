"""``loku finetune``: the model that will have to forget, or a reference that never saw what is forgotten."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import set_seed

from loku.cli.checks import check_optimizer, check_training
from loku.cli.data import Tokenised
from loku.cli.errors import CommandError, blaming
from loku.cli.models import held_whole, load_model, load_tokenizer, mend_generation_config, model_from_config
from loku.cli.options import DataOptions, ModelOptions, as_dict, option, parse
from loku.cli.run_folder import TRAINING_SETTLED, RunFolder, costs_of
from loku.evaluation import perplexity
from loku.files import filling
from loku.report import Run
from loku.training import JsonLinesCallback, UnlearnConfig, UnlearningTrainer, last_whole_checkpoint


@dataclass
class FinetuneRun:
    """What to train on."""

    train: list[str] | None = option(None, "sources, one or several: TOFU splits, tdec[0:32], wikitext2:train, .jsonl")
    model_config: str | None = option(None, "YAML or JSON with model_type and sizes: a new model, instead of --model")
    resume: bool = option(False, "go on from the last checkpoint in output_dir")


def main(argv: list[str]) -> None:
    """Train all weights of a model on the answers (or the texts) of data sets.

    TOFU's recipe is 5 epochs in batches of 32, at learning rate 1e-5 for Llama2 and 2e-5 for Phi, weight decay 0.01.
    The model and its tokenizer are written to the folder `model` of the run.
    """
    types = [ModelOptions, DataOptions, FinetuneRun, UnlearnConfig]
    options = parse("finetune", types, argv, main.__doc__, method="finetune")
    model_options, data_options, finetune, args = options
    if not finetune.train:
        raise CommandError("--train is required: TOFU splits, tdec[0:32], wikitext2:train, or .jsonl files")
    if (model_options.model is None) == (finetune.model_config is None):
        raise CommandError("give one of --model and --model_config")
    check_training(args, finetune.resume)
    outputs = ("model", "checkpoint-*")
    run = RunFolder(args.output_dir, finetune.resume, args.process_index == 0, outputs, model_options)

    set_seed(args.seed)
    tokenizer = load_tokenizer(model_options)
    with held_whole(args):
        if finetune.model_config is None:
            model = load_model(model_options)
        else:
            model = model_from_config(finetune.model_config, tokenizer, model_options.dtype)
    mend_generation_config(model)
    check_optimizer(args, model)
    sources = Tokenised.of(data_options, tokenizer, model)
    examples = [example for source in finetune.train for example in sources.examples(source)]
    settled = as_dict(model_options, data_options, finetune)
    run.begin(as_dict(*options), [*settled.keys() - {"data_dir", "resume"}, *TRAINING_SETTLED])
    args.include_num_input_tokens_seen = "non_padding"  # which the command line cannot say
    with blaming():
        trainer = UnlearningTrainer(
            model=model,
            args=args,
            retain_dataset=examples,
            processing_class=tokenizer,
            callbacks=[JsonLinesCallback(run / "metrics.jsonl")],
        )
    trainer.train(resume_from_checkpoint=last_whole_checkpoint(run.path) if finetune.resume else None)
    state_dict = trainer.gathered_state_dict()
    if trainer.is_world_process_zero():
        with filling(run / "model") as folder:
            model.save_pretrained(folder, state_dict=state_dict)
            tokenizer.save_pretrained(folder)
    after = {"train_perplexity": perplexity(trainer.model, examples[:300])}  # every process: it may be sharded
    if trainer.is_world_process_zero():
        run.write_results({"after": after, **costs_of(Run.load(run.path), trainer.state)})
