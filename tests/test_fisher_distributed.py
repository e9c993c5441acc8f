"""FisherAccumulator over two processes: their results are summed, whatever part of the data each has."""

from __future__ import annotations

import types
from pathlib import Path

import pytest
import torch
from torch import Tensor, distributed, multiprocessing, nn

from loku_kernels import FisherAccumulator

PARTS = {"even": [[0, 2], [1, 3]], "uneven": [[0, 1, 2], [3]], "all on one": [[], [0, 1, 2, 3]]}


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.first, self.second = nn.Embedding(23, 6), nn.Linear(6, 9), nn.Linear(9, 23)

    def forward(self, input_ids: Tensor) -> types.SimpleNamespace:
        return types.SimpleNamespace(logits=self.second(self.first(self.embedding(input_ids)).tanh()))


def batches() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, 5), (2, 7), (3, 4), (1, 9)]
    return [{"input_ids": ids, "labels": ids} for ids in (torch.randint(23, s, generator=generator) for s in shapes)]


def accumulate(model: nn.Module, numbers: list[int], **options) -> dict[str, Tensor]:
    found = {}
    with FisherAccumulator(model, **options) as accumulator:
        for _ in accumulator.groups():
            for number in numbers:
                accumulator.update(batches()[number])
            found |= {name: fisher.clone() for name, fisher in accumulator.fisher.items()}
    return found


def rank_main(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    alone = [distributed.new_group([r]) for r in range(2)][rank]
    results = {}
    for part, numbers in PARTS.items():
        for granularity in ("sequence", "token", "batch"):
            results[part, granularity] = accumulate(Model().double(), numbers[rank], granularity=granularity)
    results["groups"] = accumulate(Model().double(), PARTS["uneven"][rank], memory_budget=9 * 23 * 8, accumulators=1)
    wrapped = nn.parallel.DistributedDataParallel(Model().double())
    results["wrapped"] = accumulate(wrapped, PARTS["uneven"][rank])
    results["alone"] = accumulate(Model().double(), PARTS["uneven"][rank], process_group=alone)
    results["once"] = summed_once(rank)
    torch.save(results, Path(folder) / f"{rank}.pt")
    distributed.destroy_process_group()


def summed_once(rank: int) -> dict[str, Tensor]:
    """Asking twice sums once; a state is a rank's own and is resumed by it; after the sum nothing can be added."""
    with FisherAccumulator(Model().double()) as accumulator:
        accumulator.update(batches()[rank])
        state = {name: tensor.clone() for name, tensor in accumulator.state_dict().items()}
    with FisherAccumulator(Model().double()) as accumulator:
        accumulator.load_state_dict(state)
        accumulator.update(batches()[2 + rank])
        _ = accumulator.fisher
        for action, use in (
            ("accumulate", lambda: accumulator.update(batches()[0])),
            ("saved", accumulator.state_dict),
        ):
            with pytest.raises(
                RuntimeError, match=f"the ranks' results have been summed, and can no longer .*{action}"
            ):
                use()
        return accumulator.fisher


def test_two_processes(tmp_path):
    multiprocessing.spawn(rank_main, (str(tmp_path),), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for granularity in ("sequence", "token", "batch"):
        expected = accumulate(Model().double(), [0, 1, 2, 3], granularity=granularity)
        for part in PARTS:
            for results in ranks:
                torch.testing.assert_close(results[part, granularity], expected, rtol=1e-12, atol=0)
    expected = accumulate(Model().double(), [0, 1, 2, 3])
    for results in ranks:
        for how in ("groups", "wrapped", "once"):
            torch.testing.assert_close(results[how], expected, rtol=1e-12, atol=0)
    for results, numbers in zip(ranks, PARTS["uneven"], strict=True):
        torch.testing.assert_close(results["alone"], accumulate(Model().double(), numbers), rtol=0, atol=0)
