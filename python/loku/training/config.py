"""What an unlearning run can be told, beside all that transformers' trainer can."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from transformers import TrainingArguments

from loku.training.methods import Method, get_method

Packing = Literal["auto", "always", "never"]


@dataclass
class UnlearnConfig(TrainingArguments):
    """`transformers.TrainingArguments` with the method, and how batches are laid out.

    ``per_device_train_batch_size`` counts items: a forget sequence with its retain sequence, and its preferred one,
    where the method needs them.

    Args:
        method: a name in `loku.training.METHODS`.
        retain_weight, beta, gamma: of the method, see `loku.training.get_method`; None for its published settings.
        packing: ``"auto"``: several sequences a row without attention across them, where `loku.data.packing_is_exact`
            finds that the model keeps them apart, otherwise padded to the longest of the batch. ``"always"``: refuse
            models that do not. ``"never"``: padded.
        row_tokens: most tokens in a packed row: no fewer than the longest sequence has, and no more than the model's
            context. None: 512, on a CPU 128, within these bounds.
        chunk_bytes: most bytes of logits at a time; None for the kernels' own choice.

    Three defaults differ from transformers': ``remove_unused_columns`` is False, as items are no columns;
    ``ddp_find_unused_parameters`` is False, as every adapter weight is used and the search would need the logits;
    ``data_seed`` is ``seed``, so that the order of the data does not hang on what else drew random numbers. And where
    there is no accelerator, memory is not pinned, and the processes that `torchrun` started ``use_cpu``, without which
    each would train by itself.

    Raises:
        ValueError: an unknown method, option or packing; settings that unlearning cannot honour
            (``remove_unused_columns``, ``label_smoothing_factor``, ``dataloader_persistent_workers``,
            ``train_sampling_strategy``, ``dispatch_batches`` or no ``even_batches`` in ``accelerator_config``).
    """

    _argument_group_name = "training, as of transformers' TrainingArguments, and methods"

    method: str = field(default="loku", metadata={"help": "How to forget: a name in loku.training.METHODS."})
    retain_weight: float | None = field(default=None, metadata={"help": "Weight of the retain term."})
    beta: float | None = field(default=None, metadata={"help": "Inverse temperature of npo, simnpo and dpo."})
    gamma: float | None = field(default=None, metadata={"help": "Reward margin of simnpo."})
    packing: str = field(default="auto", metadata={"help": "Several sequences a row.", "choices": get_args(Packing)})
    row_tokens: int | None = field(default=None, metadata={"help": "Most tokens in a packed row."})
    chunk_bytes: int | None = field(default=None, metadata={"help": "Most bytes of logits at a time."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Must be False."})
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "True makes the trainer compute all logits, which takes more memory."}
    )

    def __post_init__(self) -> None:
        if not torch.accelerator.is_available():
            self.dataloader_pin_memory = False
            self.use_cpu = self.use_cpu or int(os.environ.get("WORLD_SIZE", 1)) > 1
        super().__post_init__()
        self.unlearning_method()
        if self.packing not in get_args(Packing):
            raise ValueError(f"packing must be one of {', '.join(get_args(Packing))}, got {self.packing!r}")
        for name in ("row_tokens", "chunk_bytes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be positive or None, got {value}")
        if self.remove_unused_columns:
            raise ValueError("remove_unused_columns must be False: the items of a batch are no columns")
        if self.label_smoothing_factor != 0:
            raise ValueError(f"label_smoothing_factor must be 0, got {self.label_smoothing_factor}")
        if self.dataloader_persistent_workers:
            raise ValueError("dataloader_persistent_workers must be False: they would keep to the first epoch's pairs")
        if self.accelerator_config.dispatch_batches:
            raise ValueError(
                "dispatch_batches in accelerator_config must not be True: a batch would be cut at its number of rows, "
                "which is not that of its scored tokens"
            )
        if not self.accelerator_config.even_batches:
            raise ValueError(
                "even_batches in accelerator_config must not be False: a process without a batch would keep the others "
                "waiting"
            )
        if self.train_sampling_strategy not in ("random", "sequential"):
            raise ValueError(
                "train_sampling_strategy must be 'random' or 'sequential', as the items of a batch are pairs and "
                f"packing evens out lengths, got {self.train_sampling_strategy!r}"
            )
        if self.data_seed is None:
            self.data_seed = self.seed

    def unlearning_method(self) -> Method:
        """The method with the options given."""
        return get_method(self.method, retain_weight=self.retain_weight, beta=self.beta, gamma=self.gamma)
