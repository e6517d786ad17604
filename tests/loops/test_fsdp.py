"""FSDP2: a sharded model trains as one process on the whole batch, the regularised layer sharded or not."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel

from fam_optim import FAM, dataset_relative_flatness
from tests.distributed import (
    FSDP,
    FSDP_RUNS,
    LAM,
    LR,
    Net,
    assert_weights,
    batch,
    build,
    check_training,
    descend,
    descended,
    each,
    kappa_by_definition,
    objective,
    processes,
    regularizes,
    root,
    share,
    shares,
)
from tests.support import assert_close

pytestmark = pytest.mark.skipif(not FSDP_RUNS, reason="torch 2.6's FSDP2 does not run on the CPU")


def replicas() -> Any:
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))


Shard = Callable[..., Net]
every_plan = pytest.mark.parametrize("shard", FSDP.values(), ids=FSDP)
every_layer = pytest.mark.parametrize("layer", ["head", "middle"])


@processes(4)
@every_layer
@pytest.mark.parametrize("shard", [each, root])
def test_hybrid_sharding(shard: Shard, layer: str) -> None:
    """Replicas of sharded models: gradients are reduced along both axes."""
    check_training(partial(shard, mesh_of=replicas), [layer])


@processes(2)
@every_layer
@every_plan
def test_accumulation(shard: Shard, layer: str) -> None:
    rank = dist.get_rank()
    model: Any = shard(Net())
    optimizer = build(model, [layer])
    for step in range(2):
        dealt = shares(step, [2] * 6)[3 * rank : 3 * (rank + 1)]
        optimizer.zero_grad()
        for i, (x, y) in enumerate(dealt):
            model.set_requires_gradient_sync(i == 2)
            optimizer.regularize(F.cross_entropy(model(x), y) / 3).backward()
        optimizer.step()
        assert_weights(model, descended(step + 1, (layer,), n=12), f"weights after step {step}")


def at_once(model: Net, optimizer: FAM, dealt: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    losses = [F.cross_entropy(model(x), y) for x, y in dealt]
    return optimizer.regularize((losses[0] + losses[1]) / 2)


def one_by_one(model: Net, optimizer: FAM, dealt: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    losses = [optimizer.regularize(F.cross_entropy(model(x), y)) for x, y in dealt]
    return (losses[0] + losses[1]) / 2


@processes(2)
@pytest.mark.parametrize(("layer", "loss_of"), [("head", at_once), ("middle", at_once), ("head", one_by_one)])
@every_plan
def test_two_forwards_in_one_backward(shard: Shard, layer: str, loss_of: Callable[..., Tensor]) -> None:
    """The second forward may free what kappa of the first has gathered."""
    model = shard(Net())
    optimizer = build(model, [layer])
    for step in range(2):
        first = 2 * dist.get_rank()
        optimizer.zero_grad()
        loss_of(model, optimizer, shares(step, [2] * 4)[first : first + 2]).backward()
        optimizer.step()
        assert_weights(model, descended(step + 1, (layer,)), f"weights after step {step}")


@processes(2)
@every_layer
@every_plan
def test_measuring_without_a_backward_leaves_the_model_as_it_was(shard: Shard, layer: str) -> None:
    """kappa gathers weights. The next forward, after they have changed, must gather them anew."""
    model = shard(Net())
    optimizer = build(model, [layer])
    for step in range(3):
        x, y = share(step)
        observed = model.get_submodule(layer)
        measured = dataset_relative_flatness(model, observed, F.cross_entropy, [(x, y)])
        dist.all_reduce(measured)
        expected = kappa_by_definition(descended(step, (layer,)), layer, *batch(step))
        assert_close([measured / dist.get_world_size()], [expected], f"kappa before step {step}")
        regularizes(model, optimizer, x, y)
        assert_weights(model, descended(step + 1, (layer,)), f"weights after step {step}")


@processes(2)
@every_plan
def test_gradients_zeroed_in_place(shard: Shard) -> None:
    def style(run: Any, optimizer: FAM, x: Tensor, y: Tensor, loss_fn: Callable[..., Tensor]) -> None:
        def closure() -> Tensor:
            optimizer.zero_grad(set_to_none=False)
            return loss_fn(run(x), y)

        optimizer.step(closure)

    check_training(shard, ["head"], style)


@processes(2)
@every_plan
def test_frozen_body(shard: Shard) -> None:
    model, twin = Net(), Net()
    for net in (model, twin):
        net.body.requires_grad_(False)
    shard(model)
    optimizer = build(model, ["middle"])
    regularizes(model, optimizer, *share(0))
    descend(twin, objective(twin, ["middle"], F.cross_entropy, *batch(0)))
    assert_weights(model, twin, "weights")


@processes(2)
def test_sharded_parameter_is_refused() -> None:
    model: Any = root(Net())
    with pytest.raises(TypeError, match=r"a sharded one.*pass the module that owns it"):
        FAM(model.parameters(), torch.optim.SGD, model.head.weight, mode="hutchinson", lr=LR)


@processes(2)
@pytest.mark.parametrize("use_orig_params", [True, False])
def test_first_generation_is_refused(use_orig_params: bool) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated, and its parameters are not the layer's
        model = FullyShardedDataParallel(
            Net(), device_id=torch.device("cpu"), use_orig_params=use_orig_params
        )
        optimizer = FAM(model.parameters(), torch.optim.SGD, model.module.head, LAM, lr=LR)
    with pytest.raises(TypeError, match=r"\(FSDP1\).*fully_shard"):
        regularizes(model, optimizer, *batch(0))
