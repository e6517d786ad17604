"""The proximal step in several processes: that of one process on the whole batch with the same signs."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from fam_optim import FAM
from fam_optim.estimators import roots
from tests.distributed import DDP, Net, assert_weights, batch, processes, share

SETTINGS: dict[str, Any] = {"mode": "proximal", "every": 2, "lr": 0.1, "momentum": 0.9}


class Signs:
    """What this process draws; for the one process that stands in for all, what all have drawn."""

    def __init__(self) -> None:
        self.mine: list[Tensor] = []
        self.whole: list[Tensor] = []
        self.original = roots.rademacher

    def draw(self, shape: Any, like: Tensor, generator: torch.Generator) -> Tensor:
        self.mine.append(self.original(shape, like, generator))
        parts = [torch.empty_like(self.mine[-1]) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, self.mine[-1])
        self.whole.append(torch.cat(parts))
        return self.mine[-1]

    def repeat(self, shape: Any, like: Tensor, generator: torch.Generator) -> Tensor:
        return self.whole.pop(0).reshape(shape)


def step(run: Any, optimizer: FAM, x: Tensor, y: Tensor) -> None:
    optimizer.zero_grad()
    optimizer.regularize(F.cross_entropy(run(x), y)).backward()
    optimizer.step()


@processes(2, 4)
@pytest.mark.parametrize("n_samples", [1, 2])
@pytest.mark.parametrize("wrapper", DDP)
def test_is_one_process_with_the_same_signs(wrapper: str, n_samples: int) -> None:
    model, twin = Net(), Net()
    run = DDP[wrapper](model)
    optimizer, alone = (
        FAM(
            m.parameters(),
            torch.optim.SGD,
            [m.body[0], m.middle],
            n_samples=n_samples,
            **SETTINGS,
        )
        for m in (model, twin)
    )
    assert alone.regularizer is not None
    alone.regularizer.roots._replicas.__dict__["group"] = None
    signs = Signs()
    try:
        for number in range(6):
            roots.rademacher = signs.draw
            step(run, optimizer, *share(number))
            roots.rademacher = signs.repeat
            step(twin, alone, *batch(number))
            assert_weights(model, twin, f"weights after step {number}")
    finally:
        roots.rademacher = signs.original


@processes(2)
def test_replicas_stay_alike_for_fifty_steps() -> None:
    """With gradients added up under no_sync, and dropout that differs by process."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 3))
    run = DistributedDataParallel(model)
    optimizer = FAM.for_model(model, torch.optim.AdamW, every=3, lr=0.01)
    torch.manual_seed(dist.get_rank())
    for number in range(50):
        x, y = share(number)
        optimizer.zero_grad()
        with run.no_sync():
            optimizer.regularize(F.cross_entropy(run(x), y)).backward()
        optimizer.regularize(F.cross_entropy(run(x + 1), y)).backward()
        optimizer.step()
    mine = torch.cat([p.detach().flatten() for p in model.parameters()])
    first = mine.clone()
    dist.broadcast(first, 0)
    assert torch.equal(mine, first)


class Routed(nn.Module):
    """Each process uses one of two branches; a third is used by none."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.branches = nn.ModuleList(nn.Linear(5, 4) for _ in range(3))
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.branches[dist.get_rank()](x).tanh())


@processes(2)
def test_weights_that_some_processes_do_not_use() -> None:
    model = Routed()
    run = DistributedDataParallel(model, find_unused_parameters=True)
    before = [branch.weight.detach().clone() for branch in model.branches]
    optimizer = FAM.for_model(model, torch.optim.SGD, every=1, lr=0.1)
    for number in range(3):
        step(run, optimizer, *share(number))
    for used, branch, old in zip((True, True, False), model.branches, before, strict=True):
        assert torch.equal(branch.weight, old) != used
        first = branch.weight.detach().clone()
        dist.broadcast(first, 0)
        assert torch.equal(branch.weight, first)


class InTurns(nn.Module):
    """All processes use the same of two branches, of which one has a wide output."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.branches = nn.ModuleList([nn.Linear(5, 31), nn.Linear(5, 31)])
        self.middle, self.head = nn.Linear(31, 4), nn.Linear(4, 3)
        self.turn = 0

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.middle(self.branches[self.turn // 2 % 2](x).tanh()).tanh())


@processes(2)
def test_weights_used_in_turns_have_the_means_of_one_process() -> None:
    """A weight that no process uses keeps its mean."""
    model, twin = InTurns(), InTurns()
    run = DistributedDataParallel(model, find_unused_parameters=True)
    optimizer, alone = (FAM.for_model(m, torch.optim.SGD, every=1, lr=0.1) for m in (model, twin))
    alone.regularizer.roots._replicas.__dict__["group"] = None
    signs = Signs()
    try:
        for number in range(8):
            model.turn = twin.turn = number
            x, y = batch(number, 64)
            mine = slice(32 * dist.get_rank(), 32 * dist.get_rank() + 32)
            roots.rademacher = signs.draw
            step(run, optimizer, x[mine], y[mine])
            roots.rademacher = signs.repeat
            step(twin, alone, x, y)
            assert_weights(model, twin, f"weights after step {number}")
    finally:
        roots.rademacher = signs.original


@processes(2)
def test_signs_differ_whatever_the_seeds_of_the_processes() -> None:
    """A seed that falls as the rank grows must not make up for the rank."""
    torch.manual_seed(100 - dist.get_rank())
    model = Net()
    run = DistributedDataParallel(model)
    torch.manual_seed(100 - dist.get_rank())
    optimizer = FAM.for_model(model, torch.optim.SGD, every=1, lr=0.1)
    signs = Signs()
    roots.rademacher = signs.draw
    try:
        step(run, optimizer, *share(0))
    finally:
        roots.rademacher = signs.original
    first, second = signs.whole[0].chunk(2)
    assert not torch.equal(first, second)


@processes(2)
def test_batches_that_end_on_some_processes_are_refused() -> None:
    model = Net()
    run = DistributedDataParallel(model)
    optimizer = FAM.for_model(model, torch.optim.SGD, every=2, lr=0.1)
    step(run, optimizer, *share(0))
    with run.join(), pytest.raises(RuntimeError, match=r"join\(\) some have no batches left.*drop_last=True"):
        optimizer.regularize(F.cross_entropy(run(share(1)[0]), share(1)[1]))


@processes(2)
def test_processes_without_ddp_are_refused() -> None:
    model = Net()
    optimizer = FAM.for_model(model, torch.optim.SGD, every=1, lr=0.1)
    message = r"no DistributedDataParallel module is found.*call gc\.freeze\(\), if at all, after the first"
    with pytest.raises(RuntimeError, match=message):
        step(model, optimizer, *share(0))
    run = DistributedDataParallel(model)
    gc.freeze()  # hides it
    with pytest.raises(RuntimeError, match=message):
        step(run, optimizer, *share(0))
    gc.unfreeze()
    step(run, optimizer, *share(0))
    gc.freeze()
    step(run, optimizer, *share(1))


@processes(2)
def test_sharded_weights_are_refused() -> None:
    model = Net()
    fully_shard(model)
    with pytest.raises(TypeError, match=r"sharded.*Use DDP, or with FSDP2 mode='hutchinson'"):
        FAM.for_model(model, torch.optim.SGD, lr=0.1)
