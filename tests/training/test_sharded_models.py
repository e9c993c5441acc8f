"""FSDP in both its forms, over two processes with gloo: losses and gradients are those of the whole model."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, distributed, multiprocessing, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from training_setup import batch_of, causal_lm, sequences, with_adapter
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from loku.data import Role
from loku.training.scores import Scorer

REFUSALS = {
    "fsdp2": "the head's weight is sharded",
    "fsdp1": "FullyShardedDataParallel may hold its parameters in parts",
}


def whole_model() -> nn.Module:
    return with_adapter(causal_lm("llama"), target_modules=["q_proj", "v_proj", "down_proj"])


def shard(model: nn.Module, form: str) -> nn.Module:
    """fsdp2: outside of forward and backward parameters are DTensors. fsdp1: views of flat ones, empty on a rank."""
    if form == "fsdp1":
        policy = ModuleWrapPolicy({LlamaDecoderLayer})
        device = torch.device("cpu")
        return FullyShardedDataParallel(model, auto_wrap_policy=policy, use_orig_params=True, device_id=device)
    mesh = init_device_mesh("cpu", (2,))
    for module in [m for m in model.modules() if isinstance(m, LlamaDecoderLayer)]:
        fully_shard(module, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def backward(model: nn.Module, scorer: Scorer, rank: int) -> Tensor:
    """Of another batch on each rank."""
    scores = scorer(model, batch_of({Role.FORGET: sequences(3, rank), Role.RETAIN: sequences(3, 10 + rank)}))
    ones = torch.ones(len(scores.targets))
    loss, _ = scores.unlearning_loss(ones, 0.5 * ones)
    loss.backward()
    return loss.detach()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def whole_gradients(model: nn.Module, form: str) -> dict[str, Tensor]:
    if form == "fsdp2":
        return {name: grad.full_tensor() for name, grad in gradients(model).items()}
    with FullyShardedDataParallel.summon_full_params(model, with_grads=True):
        return {name.replace("_fsdp_wrapped_module.", ""): grad for name, grad in gradients(model).items()}


def rank_main(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    found = {}
    for form in REFUSALS:
        model = whole_model()
        scorer = Scorer(model)  # as the trainer makes it, before the model is wrapped
        assert scorer.refusal is None
        sharded = shard(model, form)
        backward(sharded, scorer, rank)
        sharded.zero_grad()
        loss = backward(sharded, scorer, rank)
        found[form] = {"refusal": scorer.refusal, "loss": loss, "gradients": whole_gradients(sharded, form)}
    torch.save(found, Path(folder) / f"{rank}.pt")
    distributed.destroy_process_group()


def test_fsdp(tmp_path):
    multiprocessing.spawn(rank_main, (str(tmp_path),), nprocs=2)
    losses, summed = [], {}
    for rank in range(2):
        model = whole_model()
        losses.append(backward(model, Scorer(model), rank))
        for name, gradient in gradients(model).items():
            summed[name] = summed.get(name, 0) + gradient
    for rank in range(2):
        for form, found in torch.load(tmp_path / f"{rank}.pt").items():
            assert found["refusal"] == REFUSALS[form]
            torch.testing.assert_close(found["loss"], losses[rank], rtol=1e-5, atol=0)
            assert found["gradients"].keys() == summed.keys()
            for name, gradient in found["gradients"].items():  # FSDP averages over ranks
                torch.testing.assert_close(2 * gradient, summed[name], rtol=1e-4, atol=1e-5)
