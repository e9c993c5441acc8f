"""transformers' trainer, for unlearning."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import TrainOutput
from transformers.utils import logging

from loku.data import Example, PairedDataset, Role, UnlearningCollator, packing_is_exact
from loku.data.collate import sequences_of
from loku.data.examples import scored_length
from loku.fila.stored_form import fila_adapters, has_fila
from loku.files import writing
from loku.inference import adapter_off, context_length, evaluation_mode
from loku.training.callbacks import EvaluationCallback, TrainingIsOver
from loku.training.checkpoints import checkpoint_fault, last_whole_checkpoint
from loku.training.config import UnlearnConfig
from loku.training.methods import Method, Totals
from loku.training.reference import check_reference
from loku.training.scores import Scorer, Scores

logger = logging.get_logger(__name__)


class UnlearningTrainer(Trainer):
    """`transformers.Trainer` on forget and retain sequences, which share each forward pass.

    args = UnlearnConfig("run", method="ihl", learning_rate=1e-4, per_device_train_batch_size=8)
    trainer = UnlearningTrainer(model, args, forget_dataset=forget, retain_dataset=retain)
    trainer.train()

    Accumulation, bf16, checkpoints and resuming, ``report_to``, ``accelerate launch`` and ``torchrun`` are the
    trainer's. Each role's loss is a mean over that role's tokens, or sequences, in all that an optimiser step sees:
    accumulated micro-batches, on all processes. So neither accumulation nor the number of processes changes what is
    minimised, but where the pairs do not divide by a batch of all processes: accelerate then fills the epoch's last
    batch with its first pairs, of which a warning tells. Beside ``loss`` the log has its terms, ``forget_loss`` and
    ``retain_loss``.

    The head runs on scored tokens only, a chunk at a time; see `loku.training.Scorer` for which heads it cannot
    (sharded ones, by FSDP or ZeRO-3, for example), whose models compute their logits as usual. ``trainer.scorer``
    tells. A run that resumes at the same arguments ends at the same weights as one that never stopped.

    Args:
        model: a causal language model of transformers, plain or as a PeftModel.
        args: what to do.
        forget_dataset, retain_dataset, preferred_dataset: sequences of `loku.data.Example`, as `loku.data.tokenise`
            makes them. Those that the method needs must be given; others are left alone. ``preferred_dataset[i]`` is
            what should be said in place of ``forget_dataset[i]``.
        options: as of `transformers.Trainer`, but for ``train_dataset``, ``data_collator`` and ``model_init``. A loss
            of one's own is a `Method`, and metrics come from an `EvaluationCallback`: ``compute_loss_func``,
            ``compute_metrics`` and ``preprocess_logits_for_metrics`` are refused. Items of an ``eval_dataset`` are
            {Role: Example}, as of a `loku.data.PairedDataset`, with all that a term of the method's loss needs.

    Raises:
        TypeError: args is no UnlearnConfig, a data set has no length, or an option is not served.
        ValueError: a data set that the method needs is missing or empty; a sequence has no label to score, or is longer
            than the model's context; the method needs a reference, and the model is no PeftModel, also trains weights
            of its base, or has an active adapter that is not trained; the method needs FILA, and no active adapter was
            started by it; ``packing="always"`` and the model does not keep packed sequences apart; a FILA adapter would
            be sharded by FSDP 1 or ZeRO-3, or ZeRO-3 would not save what it trains.
    """

    loss_is_scaled_for_ga = True  # by the totals

    def __init__(
        self,
        model: nn.Module,
        args: UnlearnConfig,
        forget_dataset: Sequence[Example] | None = None,
        retain_dataset: Sequence[Example] | None = None,
        preferred_dataset: Sequence[Example] | None = None,
        **options: Any,
    ) -> None:
        _check_options(args, options)
        self.method = args.unlearning_method()
        given = {Role.FORGET: forget_dataset, Role.RETAIN: retain_dataset, Role.PREFERRED: preferred_dataset}
        pairs = _pairs(self.method, given, args.data_seed)
        longest = _check_lengths(model, _training_sets(pairs) | _evaluation_sets(self.method, options))
        _check_adapter(model, self.method)
        if args.n_gpu > 1:
            logger.warning(f"Using one of {args.n_gpu} GPUs: a packed batch cannot be split; launch with torchrun.")
            args._n_gpu = 1
        super().__init__(model, args, train_dataset=pairs, **options)
        _check_sharding(self.accelerator.state, has_fila(model))
        self.model_accepts_loss_kwargs = True  # whatever its forward takes: the trainer counts items for the loss
        with self.accelerator.autocast():
            self.scorer = Scorer(self.model, args.chunk_bytes)
            row_tokens = _row_tokens(self.model, args, longest)
        self.data_collator = UnlearningCollator(row_tokens=row_tokens)
        self._check_batches(len(pairs))
        self._parts: dict[str, Tensor] = {}
        self._parts_since = 0
        self.add_callback(_Beginnings(pairs, self._parts))

    def _check_batches(self, pairs: int) -> None:
        """Raises ValueError if no batch would be left; warns of pairs that come twice."""
        at_once = self.args.per_device_train_batch_size * self.accelerator.num_processes
        if self.args.dataloader_drop_last and pairs < at_once:
            raise ValueError(
                f"dataloader_drop_last would leave nothing to train on: there are {pairs} pairs, but the "
                f"batches of all processes have {at_once}"
            )
        repeated = 0 if self.accelerator.num_processes == 1 or self.args.dataloader_drop_last else -pairs % at_once
        if repeated:
            logger.warning(
                f"The {pairs} pairs are no multiple of {at_once}, the batches of all processes: {repeated} of them "
                "come twice in every epoch"
            )

    def train(self, resume_from_checkpoint: str | bool | None = None, **options: Any) -> Any:
        """As `transformers.Trainer.train`; ``resume_from_checkpoint=True`` takes the newest checkpoint that is whole.

        A checkpoint from which there is nothing to go on, after ``max_steps`` or with the aim of an
        `EvaluationCallback` reached, is loaded and left as it is (or the best one is, with ``load_best_model_at_end``).

        Raises:
            ValueError: the checkpoint is not whole, or none is; nothing of the model is trainable.
        """
        if not any(parameter.requires_grad for parameter in self.model.parameters()):
            raise ValueError(
                "model has no trainable parameter; an adapter that is loaded to be trained needs is_trainable=True"
            )
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_whole_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise ValueError(f"{self.args.output_dir} has no checkpoint to resume from")
        elif resume_from_checkpoint:
            fault = checkpoint_fault(resume_from_checkpoint)
            if fault is not None:
                raise ValueError(f"cannot resume from {resume_from_checkpoint}: {fault}")
        try:
            return super().train(resume_from_checkpoint=resume_from_checkpoint, **options)
        except TrainingIsOver:
            if self.args.load_best_model_at_end and self.state.best_model_checkpoint is not None:
                self._load_best_model()
            self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)
            self.is_in_train = False
            return TrainOutput(self.state.global_step, 0.0, {})

    def add_callback(self, callback: type[TrainerCallback] | TrainerCallback) -> None:
        super().add_callback(callback)
        evaluations = [known for known in self.callback_handler.callbacks if isinstance(known, EvaluationCallback)]
        for place, known in enumerate(evaluations):
            known.trainer, known.place = self, place

    def gathered_state_dict(self) -> dict[str, Tensor] | None:
        """What ``save_pretrained(..., state_dict=...)`` needs of a sharded model: whole weights, on rank 0 only.

        None where every process holds the model. Every process must call this.
        """
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        return self.accelerator.get_state_dict(self.model_wrapped) if sharded else None

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, dict]:
        """This micro-batch's share of the loss, times the number of processes, over which gradients are averaged."""
        if num_items_in_batch is None:
            num_items_in_batch = self._get_num_items_in_batch([inputs], self.args.device)
        totals = Totals(*num_items_in_batch)
        if not model.training:
            self.method.check_roles({role for role in Role if totals.sequences[role]})
        reference = self._reference(model, inputs) if self.method.reference else None  # first: no graph is there yet
        loss = self.method.loss(self.scorer(model, inputs), reference, totals)
        if model.training:
            if not self._parts:
                self._parts_since = self.state.global_step
            for name, part in loss.parts.items():
                self._parts[name] = self._parts.get(name, 0) + part
        value = loss.value * self.accelerator.num_processes
        return (value, {}) if return_outputs else value

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds the means of the loss's terms since they were last logged, where the loss is logged."""
        if "loss" in logs and self._parts:
            steps = max(self.state.global_step - self._parts_since, 1)
            names, values = zip(*self._parts.items(), strict=True)
            means = self.accelerator.reduce(torch.stack(values), "sum") / steps
            logs.update(zip(names, means.tolist(), strict=True))
            self._parts.clear()
        super().log(logs, *args, **kwargs)

    def _track_num_input_tokens(self, inputs: dict[str, Tensor]) -> None:
        """Packed rows have no mask, and their padding may be any token."""
        super()._track_num_input_tokens({**inputs, "attention_mask": inputs["tokens"]})

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Raises OSError where it cannot be written; those written before are whole."""
        with writing(self.args.output_dir):
            super()._save_checkpoint(*args, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Of a FILA adapter FSDP's own file has the stored shapes, twice the rank, which FSDP cannot take apart again;
        the adapter's file beside it goes the way that it goes without FSDP."""
        if self.is_fsdp_enabled and has_fila(self.model):
            for name in self.model.active_adapters:
                folder = Path(resume_from_checkpoint, "" if name == "default" else name)
                self.model.load_adapter(str(folder), name, is_trainable=True)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _get_num_items_in_batch(self, batch_samples: Sequence[Mapping[str, Tensor]], device: torch.device) -> Tensor:
        """(2, 3): tokens and sequences of each role in these batches of all processes, see `Totals`."""
        counts = [torch.stack(Totals.of(batch)).to(device) for batch in batch_samples]
        none = torch.zeros(2, len(Role), dtype=torch.int64, device=device)
        return self.accelerator.reduce(sum(counts, start=none), "sum")

    @torch.no_grad()
    def _reference(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Scores:
        with evaluation_mode(model), adapter_off(self.model):
            return self.scorer(model, inputs)


class _Beginnings(TrainerCallback):
    """Begins the log's terms anew with each training, one tried again after an error too, and tells the pairs the
    epoch; accelerate's loaders do not where they shuffle for several processes, or resume.

    No epoch is begun after the last step.
    """

    def __init__(self, pairs: PairedDataset, parts: dict[str, Tensor]) -> None:
        self.pairs, self.parts = pairs, parts

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.parts.clear()

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.pairs.set_epoch(int(state.epoch or 0))
        if state.global_step >= state.max_steps:
            raise TrainingIsOver


def _check_options(args: UnlearnConfig, options: Mapping[str, Any]) -> None:
    if not isinstance(args, UnlearnConfig):
        raise TypeError(f"args must be an UnlearnConfig, got {type(args).__name__}")
    instead = {
        "model_init": "give the model itself",
        "compute_loss_func": "a loss of one's own is a loku.training.Method",
        "compute_metrics": "metrics come from a loku.training.EvaluationCallback",
        "preprocess_logits_for_metrics": "metrics come from a loku.training.EvaluationCallback",
    }
    for name, what in instead.items():
        if options.get(name) is not None:
            raise TypeError(f"{name} is not served: {what}")


def _pairs(method: Method, given: Mapping[Role, Sequence[Example] | None], seed: int) -> PairedDataset:
    for role in method.roles:
        if given[role] is not None and not hasattr(given[role], "__len__"):
            raise TypeError(f"{role.name.lower()}_dataset must have a length, got {type(given[role]).__name__}")
        if given[role] is None or len(given[role]) == 0:
            state = "missing" if given[role] is None else "empty"
            weight = f" (its retain_weight is {method.retain_weight:g})" if role is Role.RETAIN else ""
            raise ValueError(f"{role.name.lower()}_dataset is {state}, and method {method.name!r} needs it{weight}")
    return PairedDataset({role: given[role] for role in method.roles}, seed=seed)


def _training_sets(pairs: PairedDataset) -> dict[str, Iterable[Example]]:
    return {f"{role.name.lower()}_dataset": examples for role, examples in pairs.examples.items()}


def _evaluation_sets(method: Method, options: Mapping[str, Any]) -> dict[str, Iterable[Example]]:
    """Of one data set or several by name, those that can be gone through beforehand."""
    given = options.get("eval_dataset")
    named = {f"eval_dataset[{name!r}]": of for name, of in given.items()} if isinstance(given, dict) else {}
    sets = named or {"eval_dataset": given}
    return {name: _sequences(method, of) for name, of in sets.items() if hasattr(of, "__len__")}


def _sequences(method: Method, items: Sequence[Mapping[Role, Example]]) -> Iterator[Example]:
    for i in range(len(items)):
        roles, examples = zip(*sequences_of([items[i]]), strict=True)
        method.check_roles(set(roles))
        yield from examples


def _check_lengths(model: nn.Module, sets: Mapping[str, Iterable[Example]]) -> int:
    """The longest sequence's tokens."""
    context, longest = context_length(model), 0
    for name, examples in sets.items():
        for number, example in enumerate(examples):
            try:
                length = scored_length(example)
            except ValueError as error:
                raise ValueError(f"{name}, sequence {number}: {error}") from error
            if context is not None and length > context:
                raise ValueError(
                    f"{name} has a sequence of {length} tokens, but the model's context is {context}: number {number}"
                )
            longest = max(longest, length)
    return longest


def _check_adapter(model: nn.Module, method: Method) -> None:
    if method.reference:
        check_reference(model, f"method {method.name!r} compares with the model before unlearning")
    if method.fila and not has_fila(model):
        raise ValueError(
            f"method {method.name!r} needs an adapter started by loku.fila.initialize_lora_fila_weights, or loaded "
            f"by load_fila_adapter; without FILA it is {'ihl' if method.name == 'loku' else 'gd'!r}"
        )
    if method.fila and not fila_adapters(model).intersection(model.active_adapters):
        raise ValueError(
            f"method {method.name!r} trains the active adapters {model.active_adapters}, but FILA started "
            f"{sorted(fila_adapters(model))}; call model.set_adapter"
        )


def _check_sharding(state: AcceleratorState, fila: bool) -> None:
    """A FILA adapter is saved through its modules' state dicts, which not every kind of sharding asks."""
    if fila and state.distributed_type == DistributedType.FSDP and state.fsdp_plugin.fsdp_version == 1:
        raise ValueError("a FILA adapter needs version 2 of FSDP, fsdp_config's default, but version 1 was set")
    if state.distributed_type == DistributedType.DEEPSPEED and state.deepspeed_plugin.zero_stage == 3:
        if fila:
            raise ValueError("a FILA adapter needs DeepSpeed's ZeRO of stage 1 or 2, or FSDP, but stage 3 was set")
        if not state.deepspeed_plugin.zero3_save_16bit_model:
            raise ValueError(
                "what is trained under DeepSpeed's ZeRO-3 is saved only where its configuration says so: set "
                "stage3_gather_16bit_weights_on_model_save to true"
            )


def _row_tokens(model: nn.Module, args: UnlearnConfig, longest: int) -> int | None:
    """Tokens of a packed row, or None for padding."""
    if args.packing == "never" or (args.packing == "auto" and not packing_is_exact(model)):
        return None
    if args.packing == "always" and not packing_is_exact(model):
        raise ValueError(
            f"packing='always', but {type(model).__name__} does not keep packed sequences apart, with "
            f"attn_implementation={model.config._attn_implementation!r} at least"
        )
    # Some models (GPT-Neo) mask no more tokens than their context, although positions begin anew in a row.
    context = context_length(model)
    usual = _usual_row_tokens(model.device.type)
    most = context or max(longest, args.row_tokens or usual)
    if args.row_tokens is not None and not longest <= args.row_tokens <= most:
        raise ValueError(
            f"row_tokens must be at least {longest}, the longest sequence's tokens, and at most {most}, the model's "
            f"context, got {args.row_tokens}"
        )
    return args.row_tokens or min(max(longest, usual), most)


def _usual_row_tokens(device_type: str) -> int:
    """Attention costs the square of a row, where it is computed and masked away between sequences; a CPU feels it."""
    return 128 if device_type == "cpu" else 512
