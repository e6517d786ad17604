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
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

from fam_optim import FAM, dataset_relative_flatness
from tests.distributed import (
    LAM,
    LR,
    Net,
    assert_weights,
    batch,
    build,
    check_gauss_newton,
    check_training,
    descend,
    descended,
    kappa_by_definition,
    objective,
    processes,
    regularizes,
    share,
    shares,
    squares,
)
from tests.support import STYLES, Style, assert_close


def everyone() -> Any:
    return init_device_mesh("cpu", (dist.get_world_size(),))


def replicas() -> Any:
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))


def each(model: Net, mesh_of: Callable[[], Any] = everyone, **options: Any) -> Net:
    """Every module in a group of its own, gathered for its own forward and backward only."""
    mesh = mesh_of()
    for module in (model.body, model.middle, model.after, model.head):
        fully_shard(module, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def body(model: Net) -> Net:
    """The usual way: blocks in groups of their own, the rest in the root's."""
    mesh = everyone()
    fully_shard(model.body, mesh=mesh)
    fully_shard(model.after, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def root(model: Net, mesh_of: Callable[[], Any] = everyone, **options: Any) -> Net:
    return fully_shard(model, mesh=mesh_of(), **options)


Shard = Callable[..., Net]
PLANS: dict[str, Shard] = {
    "each": each,
    "each, kept": partial(each, reshard_after_forward=False),
    "body": body,
    "root": root,
    "root, freed": partial(root, reshard_after_forward=True),
}
every_plan = pytest.mark.parametrize("shard", PLANS.values(), ids=PLANS)
every_layer = pytest.mark.parametrize("layer", ["head", "middle"])
every_choice = pytest.mark.parametrize("layers", [["head"], ["middle"], ["middle", "head"]], ids="+".join)
every_loss = pytest.mark.parametrize("loss_fn", [F.cross_entropy, squares])


@processes(2)
@every_loss
@every_choice
@every_plan
def test_training(shard: Shard, layers: list[str], loss_fn: Callable[..., Tensor]) -> None:
    check_training(shard, layers, None, loss_fn)


@processes(2)
@pytest.mark.parametrize("detach", [False, True])
@every_plan
def test_gauss_newton(shard: Shard, detach: bool) -> None:
    check_gauss_newton(shard, detach_hessian=detach)


@processes(4)
@every_loss
@every_choice
@pytest.mark.parametrize("shard", [each, root])
def test_three_rows_over_four_processes(
    shard: Shard, layers: list[str], loss_fn: Callable[..., Tensor]
) -> None:
    check_training(shard, layers, None, loss_fn)


@processes(2)
@every_layer
@pytest.mark.parametrize("style", STYLES.values(), ids=STYLES)
@every_plan
def test_styles(shard: Shard, style: Style, layer: str) -> None:
    check_training(shard, [layer], style)


@processes(2)
@pytest.mark.parametrize("settings", [{"mode": "full"}, {"detach_hessian": True}], ids=["full", "detached"])
@every_layer
@every_plan
def test_settings(shard: Shard, layer: str, settings: dict[str, Any]) -> None:
    check_training(shard, [layer], **settings)


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
    def style(run: Any, optimizer: FAM, x: Tensor, y: Tensor) -> None:
        def closure() -> Tensor:
            optimizer.zero_grad(set_to_none=False)
            return F.cross_entropy(run(x), y)

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
@pytest.mark.parametrize("style", ["calls backward", "regularize"])
def test_compiled_body(style: str) -> None:
    def compiled_body(model: Net) -> Any:
        model.body.compile(backend="aot_eager")
        return each(model)

    check_training(compiled_body, ["middle"], STYLES[style])


@processes(2)
@pytest.mark.parametrize("style", ["calls backward", "regularize"])
def test_compiled_model(style: str) -> None:
    check_training(lambda model: torch.compile(each(model), backend="aot_eager"), ["head"], STYLES[style])


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
