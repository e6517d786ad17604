"""DistributedDataParallel: every process on its share of the batch trains as one process on the whole."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.nn.functional
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.distributed._functional_collectives import all_gather_tensor_autograd
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel

from fam_optim import FAM, observe, relative_flatness
from fam_optim.estimators import exact as exact_module
from tests.distributed import (
    DDP,
    LAM,
    Net,
    assert_weights,
    batch,
    build,
    descend,
    descended,
    evenly,
    kappa_by_definition,
    objective,
    processes,
    regularizes,
    share,
    shares,
)
from tests.support import assert_close, crossed

every_wrapper = pytest.mark.parametrize("wrapper", DDP)
every_layer = pytest.mark.parametrize("layer", ["head", "middle"])


@processes(2)
@every_layer
@every_wrapper
def test_hutchinson(wrapper: str, layer: str) -> None:
    """Probes are each process's own, so one process must draw them in the processes' stead."""
    world, rank = dist.get_world_size(), dist.get_rank()
    model, twin = Net(), Net()
    generators = [torch.Generator().manual_seed(r) for r in range(world)]
    mine = torch.Generator().manual_seed(rank)
    run = DDP[wrapper](model)
    optimizer = build(model, [layer], mode="hutchinson", n_samples=2, generator=mine)
    for step in range(3):
        regularizes(run, optimizer, *share(step))
        total = torch.zeros(())
        for generator, (x, y) in zip(generators, shares(step, evenly()), strict=True):
            with observe(twin.get_submodule(layer)) as observed:
                loss = F.cross_entropy(twin(x), y)
            kappa = relative_flatness(loss, observed, mode="hutchinson", n_samples=2, generator=generator)
            total = total + (loss + LAM * kappa) / world
        descend(twin, torch.autograd.grad(total, list(twin.parameters())))
        assert_weights(model, twin, f"weights after step {step}")


class Several(Net):
    """Returns more than logits, and not only tensors."""

    def forward(self, x: Tensor) -> Any:
        features = self.after(self.middle(self.body(x)))
        return {"nothing": None, "name": "net", "features": features, "logits": self.head(features)}

    @staticmethod
    def loss(run: Any, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(run(x)["logits"], y)


class Whole(Net):
    """Returns its loss, and something curved."""

    def forward(self, x: Tensor, y: Tensor) -> Any:  # type: ignore[override]
        z = super().forward(x)
        return z.softmax(-1), F.cross_entropy(z, y), "loss"

    @staticmethod
    def loss(run: Any, x: Tensor, y: Tensor) -> Tensor:
        return run(x, y)[1]


@processes(2)
@pytest.mark.parametrize("make", [Several, Whole])
@pytest.mark.parametrize("wrapper", ["find_unused_parameters", "static_graph"])
def test_closed_form_is_seen_through_what_ddp_puts_behind_the_model(
    wrapper: str, make: type[Several] | type[Whole]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exact_module, "MAX_PRODUCTS", 0)  # nothing but the closed form is allowed
        model = make()
        run = DDP[wrapper](model)
        optimizer = build(model, ["head"])
        for step in range(3):
            optimizer.zero_grad()
            loss = make.loss(run, *share(step))
            optimizer.regularize(loss).backward()
            optimizer.step()
            assert_weights(model, descended(step + 1, ("head",)), f"weights after step {step}")


MICRO = 4
Batches = list[tuple[Tensor, Tensor]]


def in_loop(run: Any, optimizer: FAM, parts: Batches) -> None:
    optimizer.zero_grad()
    for i, (x, y) in enumerate(parts):
        with run.no_sync() if i < MICRO - 1 else nullcontext():
            optimizer.regularize(F.cross_entropy(run(x), y) / MICRO).backward()
    optimizer.step()


def in_closure(run: Any, optimizer: FAM, parts: Batches) -> None:
    def closure() -> Tensor:
        optimizer.zero_grad()
        total = torch.zeros(())
        for i, (x, y) in enumerate(parts):
            with run.no_sync() if i < MICRO - 1 else nullcontext():
                loss = F.cross_entropy(run(x), y) / MICRO
                loss.backward()
                total += loss.detach()
        return total

    optimizer.step(closure)


@processes()
@pytest.mark.parametrize(
    ("world", "wrapper", "accumulate", "layer"),
    crossed(
        [2, 4],
        ["plain", "bucket view", "find_unused_parameters"],
        [in_loop, in_closure],
        ["head", "middle"],
        by=2,
    ),
)
def test_accumulation_without_synchronisation(
    wrapper: str, accumulate: Callable[[Any, FAM, Batches], None], layer: str
) -> None:
    """Several micro-batches a step, of which the last is synchronised."""
    world, rank = dist.get_world_size(), dist.get_rank()
    model = Net()
    run = DDP[wrapper](model)
    optimizer = build(model, [layer])
    for step in range(2):
        dealt = shares(step, [2] * (MICRO * world))
        accumulate(run, optimizer, dealt[MICRO * rank : MICRO * (rank + 1)])
        twin = descended(step + 1, (layer,), n=2 * MICRO * world)
        assert_weights(model, twin, f"weights after step {step}")


@processes(2, 4)
@every_layer
def test_uneven_last_batch(layer: str) -> None:
    """DDP weighs processes equally, loss and kappa alike; scaling the loss by the share makes it exact."""
    world, rank = dist.get_world_size(), dist.get_rank()
    sizes = [5, 3] if world == 2 else [4, 2, 1, 1]
    dealt = shares(0, sizes)
    model, twin = Net(), Net()
    optimizer = build(model, [layer])
    regularizes(DistributedDataParallel(model), optimizer, *dealt[rank])
    each = [objective(twin, [layer], F.cross_entropy, x, y) for x, y in dealt]
    descend(twin, [torch.stack(parts).mean(0) for parts in zip(*each, strict=True)])
    assert_weights(model, twin, "the mean over processes")

    def weighted(z: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(z, y) * len(y) * world / sum(sizes)

    model = Net()
    optimizer = build(model, [layer])
    regularizes(DistributedDataParallel(model), optimizer, *dealt[rank], weighted)
    assert_weights(model, descended(1, (layer,), n=sum(sizes)), "the whole batch")


@processes(2)
def test_processes_that_run_out_of_batches() -> None:
    """Within Join, one that is done adds zeros: loss and kappa of the others, over the number of all."""
    model = Net()
    run = DistributedDataParallel(model)
    optimizer = build(model, ["middle"])
    with Join([run]):
        for step in range(3 if dist.get_rank() == 0 else 2):
            regularizes(run, optimizer, *share(step))
    twin = copy.deepcopy(descended(2, ("middle",)))
    alone = objective(twin, ["middle"], F.cross_entropy, *shares(2, evenly())[0])
    descend(twin, [g / 2 for g in alone])
    assert_weights(model, twin, "weights")


@processes(2)
def test_mean_of_last_kappa_is_that_of_the_whole_batch() -> None:
    model = Net()
    optimizer = build(model, ["head"])
    regularizes(DistributedDataParallel(model), optimizer, *share(0))
    assert optimizer.last_kappa is not None
    kappa = optimizer.last_kappa.clone()
    dist.all_reduce(kappa)
    assert_close([kappa / dist.get_world_size()], [kappa_by_definition(Net(), "head", *batch(0))], "kappa")


def gathered(z: Tensor, y: Tensor) -> Tensor:
    everyone = torch.cat(torch.distributed.nn.functional.all_gather(z))
    return F.cross_entropy(z @ everyone.T, torch.arange(len(z)))


def gathered_functionally(z: Tensor, y: Tensor) -> Tensor:
    everyone = all_gather_tensor_autograd(z, 0, dist.group.WORLD)
    return F.cross_entropy(z @ everyone.T, torch.arange(len(z)))


def reduced(z: Tensor, y: Tensor) -> Tensor:
    return torch.distributed.nn.functional.all_reduce(F.cross_entropy(z, y))


@processes(2)
@pytest.mark.parametrize("loss_fn", [gathered, gathered_functionally, reduced])
def test_loss_over_all_processes_is_refused(loss_fn: Callable[..., Tensor]) -> None:
    model = Net()
    optimizer = build(model, ["head"])
    with pytest.raises(RuntimeError, match=r"communicates with other processes.*local to the process"):
        regularizes(DistributedDataParallel(model), optimizer, *batch(0), loss_fn)


def test_synchronised_batch_norm_behind_the_layer_is_refused() -> None:
    """torch's runs on accelerators alone, so an identity of its name stands in for it."""
    identity = {
        "forward": staticmethod(lambda ctx, z: z.clone()),
        "backward": staticmethod(lambda ctx, gradient: gradient),
    }
    stand_in: Any = type(torch.nn.modules._functions.SyncBatchNorm.__name__, (Function,), identity)
    model = Net().double()
    optimizer = build(model, ["middle"])
    x, y = batch(0)
    with pytest.raises(RuntimeError, match=r"SyncBatchNormBackward there communicates with other processes"):
        regularizes(model, optimizer, x.double(), y, lambda z, y: F.cross_entropy(stand_in.apply(z), y))
