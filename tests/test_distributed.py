"""Data parallel, sharded and tensor parallel training, against one process with the whole batch.

All checks for a number of processes run in one set of them (gloo, on the CPU): starting them is what takes
time. A check is a function that every process calls; what it raises in any is reported under its name.
"""

from __future__ import annotations

import copy
import datetime
import os
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.nn.functional
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.distributed._functional_collectives import all_gather_tensor_autograd
from torch.distributed.algorithms.join import Join
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from fam_optim import FAM, dataset_relative_flatness, observe, relative_flatness
from fam_optim.estimators import exact as exact_module
from tests import reference
from tests.test_fam import STYLES, Style, assert_close

LAM, LR = 0.05, 0.1
TIMEOUT = 60  # seconds that a process waits for another
Check = Callable[[], None]
CHECKS: dict[int, list[Check]] = {2: [], 4: []}


def check(*worlds: int) -> Callable[[Check], Check]:
    """Registers a check for so many processes."""

    def register(function: Check) -> Check:
        for world in worlds:
            CHECKS[world].append(function)
        return function

    return register


# The problem


class Net(nn.Module):
    """A layer to regularise in the middle and one at the end."""

    def __init__(self, unused: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(5, 4), nn.Tanh())
        self.middle = nn.Linear(4, 4)
        self.after = nn.Sequential(nn.Tanh(), nn.Linear(4, 4), nn.Tanh())
        self.head = nn.Linear(4, 3)
        if unused:
            self.unused = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.after(self.middle(self.body(x))))


def batch(step: int, n: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(n, 5, generator=generator), torch.randint(0, 3, (n,), generator=generator)


def shares(step: int, sizes: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
    """The batch as it is dealt out to the processes."""
    x, y = batch(step, sum(sizes))
    return list(zip(x.split(list(sizes)), y.split(list(sizes)), strict=True))


def evenly() -> list[int]:
    return [8 // dist.get_world_size()] * dist.get_world_size()


def squares(z: Tensor, y: Tensor) -> Tensor:
    """A loss without a closed form."""
    return (z.softmax(-1) - F.one_hot(y, 3)).square().sum(1).mean()


def objective(
    model: nn.Module,
    layers: Sequence[str],
    loss_fn: Callable[..., Tensor],
    x: Tensor,
    y: Tensor,
    detach: bool = False,
) -> list[Tensor]:
    """The gradient of loss + lam * kappa by its definition, in one process."""

    def loss() -> Tensor:
        return loss_fn(model(x), y)

    modules = [model.get_submodule(name) for name in layers]
    curvatures = reference.curvatures(loss, modules, create_graph=True)
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not detach:
        value = loss() + LAM * reference.sum_of_kappas(curvatures, "neuronwise")
        return reference.gradient(value, parameters)
    gradients = reference.gradient(loss(), parameters)
    for module, part in zip(modules, reference.part_one(curvatures, "neuronwise"), strict=True):
        index = next(i for i, p in enumerate(parameters) if p is module.weight)
        gradients[index] = gradients[index] + LAM * part
    return gradients


def kappa_by_definition(model: nn.Module, layer: str, x: Tensor, y: Tensor) -> Tensor:
    curvatures = reference.curvatures(lambda: F.cross_entropy(model(x), y), [model.get_submodule(layer)])
    return reference.sum_of_kappas(curvatures, "neuronwise").detach()


def descend(model: nn.Module, gradients: Sequence[Tensor]) -> None:
    with torch.no_grad():
        trained = [p for p in model.parameters() if p.requires_grad]
        for p, g in zip(trained, gradients, strict=True):
            p.sub_(g, alpha=LR)


@cache
def descended(
    steps: int,
    layers: tuple[str, ...],
    loss_fn: Callable[..., Tensor] = F.cross_entropy,
    detach: bool = False,
    n: int = 8,
) -> Net:
    """One process after so many steps on batches of n, by the definition."""
    if steps == 0:
        return Net()
    model = copy.deepcopy(descended(steps - 1, layers, loss_fn, detach, n))
    descend(model, objective(model, layers, loss_fn, *batch(steps - 1, n), detach))
    return model


def build(model: nn.Module, layers: Sequence[str], **settings: Any) -> FAM:
    chosen = [model.get_submodule(name) for name in layers]
    return FAM(model.parameters(), torch.optim.SGD, chosen, LAM, lr=LR, **settings)


def regularizes(
    run: Any, optimizer: FAM, x: Tensor, y: Tensor, loss_fn: Callable[..., Tensor] = F.cross_entropy
) -> None:
    optimizer.zero_grad()
    optimizer.regularize(loss_fn(run(x), y)).backward()
    optimizer.step()


def whole(parameter: Tensor) -> Tensor:
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


def assert_weights(model: nn.Module, twin: nn.Module, what: str) -> None:
    """Equal to those of one process, and the same bits in every process."""
    weights = dict(model.named_parameters())
    actual = [whole(weights[name].detach()) for name, _ in twin.named_parameters()]
    assert_close(actual, [p.detach() for p in twin.parameters()], what)
    mine = torch.cat([p.flatten() for p in actual])
    first = mine.clone()
    dist.broadcast(first, 0)
    assert torch.equal(mine, first), f"{what}: process {dist.get_rank()} differs from the first"


@contextmanager
def naming(*case: object) -> Iterator[None]:
    """Failures name their case."""
    try:
        yield
    except Exception as error:
        raise AssertionError(", ".join(map(str, case))) from error


def check_training(
    wrap: Callable[[Net], Any],
    layers: Sequence[str],
    style: Style | None = None,
    loss_fn: Callable[..., Tensor] = F.cross_entropy,
    unused: bool = False,
    **settings: Any,
) -> None:
    """Three steps on this process's share of the batches, against one process on all of them."""
    model = Net(unused)
    run = wrap(model)
    optimizer = build(model, layers, **settings)
    style = style or partial(regularizes, loss_fn=loss_fn)
    for step in range(3):
        style(run, optimizer, *shares(step, evenly())[dist.get_rank()])
        twin = descended(step + 1, tuple(layers), loss_fn, settings.get("detach_hessian", False))
        assert_weights(model, twin, f"weights after step {step}")


# DistributedDataParallel

WRAPPERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bucket view": {"gradient_as_bucket_view": True},
    "find_unused_parameters": {"find_unused_parameters": True},
    "static_graph": {"static_graph": True},
}


def ddp(**options: Any) -> Callable[[Net], Any]:
    return lambda model: DistributedDataParallel(model, **options)


@check(2, 4)
def styles() -> None:
    for wrapper, options in WRAPPERS.items():
        for name, style in STYLES.items():
            for layer in ("head", "middle"):
                with naming(wrapper, name, layer):
                    unused = wrapper in ("find_unused_parameters", "static_graph")
                    check_training(ddp(**options), [layer], style, unused=unused)


@check(2)
def settings() -> None:
    for wrapper in ("plain", "static_graph"):
        wrap = ddp(**WRAPPERS[wrapper])
        for layers, loss_fn, more in [
            (["head"], F.cross_entropy, {"mode": "full"}),
            (["head"], F.cross_entropy, {"detach_hessian": True}),
            (["middle"], F.cross_entropy, {"detach_hessian": True}),
            (["head"], squares, {}),
            (["head"], squares, {"detach_hessian": True}),
            (["middle", "head"], F.cross_entropy, {}),
        ]:
            with naming(wrapper, layers, loss_fn.__name__, more):
                check_training(wrap, layers, None, loss_fn, **more)


@check(2)
def hutchinson() -> None:
    """Probes are each process's own, so one process must draw them in the processes' stead."""
    for options in WRAPPERS.values():
        for layer in ("head", "middle"):
            with naming(options, layer):
                world, rank = dist.get_world_size(), dist.get_rank()
                model, twin = Net(), Net()
                generators = [torch.Generator().manual_seed(r) for r in range(world)]
                mine = torch.Generator().manual_seed(rank)
                run = DistributedDataParallel(model, **options)
                optimizer = build(model, [layer], mode="hutchinson", n_samples=2, generator=mine)
                for step in range(3):
                    regularizes(run, optimizer, *shares(step, evenly())[rank])
                    total = torch.zeros(())
                    for generator, (x, y) in zip(generators, shares(step, evenly()), strict=True):
                        with observe(twin.get_submodule(layer)) as observed:
                            loss = F.cross_entropy(twin(x), y)
                        kappa = relative_flatness(
                            loss, observed, mode="hutchinson", n_samples=2, generator=generator
                        )
                        total = total + (loss + LAM * kappa) / world
                    descend(twin, torch.autograd.grad(total, list(twin.parameters())))
                    assert_weights(model, twin, f"weights after step {step}")


@check(2)
def closed_form_is_seen_through_what_ddp_puts_behind_the_model() -> None:
    class Several(Net):
        """Returns more than logits, and not only tensors."""

        def forward(self, x: Tensor) -> Any:
            features = self.after(self.middle(self.body(x)))
            return {"nothing": None, "name": "net", "features": features, "logits": self.head(features)}

    class Whole(Net):
        """Returns its loss, and something curved."""

        def forward(self, x: Tensor, y: Tensor) -> Any:  # type: ignore[override]
            z = super().forward(x)
            return z.softmax(-1), F.cross_entropy(z, y), "loss"

    losses: dict[type[Net], Callable[[Any, Tensor, Tensor], Tensor]] = {
        Several: lambda run, x, y: F.cross_entropy(run(x)["logits"], y),
        Whole: lambda run, x, y: run(x, y)[1],
    }
    limit = exact_module.MAX_PRODUCTS
    exact_module.MAX_PRODUCTS = 0  # nothing but the closed form is allowed
    try:
        for wrapper in ("find_unused_parameters", "static_graph"):
            for make, loss_of in losses.items():
                with naming(wrapper, make.__name__):
                    model = make()
                    run = DistributedDataParallel(model, **WRAPPERS[wrapper])
                    optimizer = build(model, ["head"])
                    for step in range(3):
                        optimizer.zero_grad()
                        loss = loss_of(run, *shares(step, evenly())[dist.get_rank()])
                        optimizer.regularize(loss).backward()
                        optimizer.step()
                        assert_weights(model, descended(step + 1, ("head",)), f"weights after step {step}")
    finally:
        exact_module.MAX_PRODUCTS = limit


@check(2, 4)
def accumulation_without_synchronisation() -> None:
    """Four micro-batches a step, of which the last is synchronised."""
    micro = 4

    def in_loop(run: Any, optimizer: FAM, parts: list[tuple[Tensor, Tensor]]) -> None:
        optimizer.zero_grad()
        for i, (x, y) in enumerate(parts):
            with run.no_sync() if i < micro - 1 else nullcontext():
                optimizer.regularize(F.cross_entropy(run(x), y) / micro).backward()
        optimizer.step()

    def in_closure(run: Any, optimizer: FAM, parts: list[tuple[Tensor, Tensor]]) -> None:
        def closure() -> Tensor:
            optimizer.zero_grad()
            total = torch.zeros(())
            for i, (x, y) in enumerate(parts):
                with run.no_sync() if i < micro - 1 else nullcontext():
                    loss = F.cross_entropy(run(x), y) / micro
                    loss.backward()
                    total += loss.detach()
            return total

        optimizer.step(closure)

    for wrapper in ("plain", "bucket view", "find_unused_parameters"):
        for accumulate in (in_loop, in_closure):
            for layer in ("head", "middle"):
                with naming(wrapper, accumulate.__name__, layer):
                    world, rank = dist.get_world_size(), dist.get_rank()
                    model = Net()
                    run = DistributedDataParallel(model, **WRAPPERS[wrapper])
                    optimizer = build(model, [layer])
                    for step in range(2):
                        dealt = shares(step, [2] * (micro * world))
                        accumulate(run, optimizer, dealt[micro * rank : micro * (rank + 1)])
                        twin = descended(step + 1, (layer,), n=2 * micro * world)
                        assert_weights(model, twin, f"weights after step {step}")


@check(2, 4)
def uneven_last_batch() -> None:
    """DDP weighs processes equally, loss and kappa alike; scaling the loss by the share makes it exact."""
    world, rank = dist.get_world_size(), dist.get_rank()
    sizes = [5, 3] if world == 2 else [4, 2, 1, 1]
    dealt = shares(0, sizes)
    for layer in ("head", "middle"):
        model, twin = Net(), Net()
        optimizer = build(model, [layer])
        regularizes(DistributedDataParallel(model), optimizer, *dealt[rank])
        each = [objective(twin, [layer], F.cross_entropy, x, y) for x, y in dealt]
        descend(twin, [torch.stack(parts).mean(0) for parts in zip(*each, strict=True)])
        assert_weights(model, twin, f"{layer}: the mean over processes")

        def weighted(z: Tensor, y: Tensor) -> Tensor:
            return F.cross_entropy(z, y) * len(y) * world / sum(sizes)

        model = Net()
        optimizer = build(model, [layer])
        regularizes(DistributedDataParallel(model), optimizer, *dealt[rank], weighted)
        assert_weights(model, descended(1, (layer,), n=sum(sizes)), f"{layer}: the whole batch")


@check(2)
def processes_that_run_out_of_batches() -> None:
    """Within Join, one that is done adds zeros: loss and kappa of the others, over the number of all."""
    rank = dist.get_rank()
    model = Net()
    run = DistributedDataParallel(model)
    optimizer = build(model, ["middle"])
    with Join([run]):
        for step in range(3 if rank == 0 else 2):
            regularizes(run, optimizer, *shares(step, evenly())[rank])
    twin = copy.deepcopy(descended(2, ("middle",)))
    alone = objective(twin, ["middle"], F.cross_entropy, *shares(2, evenly())[0])
    descend(twin, [g / 2 for g in alone])
    assert_weights(model, twin, "weights")


@check(2)
def mean_of_last_kappa_is_that_of_the_whole_batch() -> None:
    model = Net()
    optimizer = build(model, ["head"])
    run = DistributedDataParallel(model)
    regularizes(run, optimizer, *shares(0, evenly())[dist.get_rank()])
    assert optimizer.last_kappa is not None
    kappa = optimizer.last_kappa.clone()
    dist.all_reduce(kappa)
    assert_close([kappa / dist.get_world_size()], [kappa_by_definition(Net(), "head", *batch(0))], "kappa")


@check(2)
def compiled_models() -> None:
    mesh = init_device_mesh("cpu", (2,))
    compiled = partial(torch.compile, backend="aot_eager")

    def compiled_body(model: Net) -> Any:
        model.body.compile(backend="aot_eager")
        return each(mesh)(model)

    cases: dict[str, tuple[Callable[[Net], Any], str]] = {
        "compiled, then DDP": (lambda model: DistributedDataParallel(compiled(model)), "head"),
        "compiled body, then FSDP2": (compiled_body, "middle"),
        "FSDP2, then compiled": (lambda model: compiled(each(mesh)(model)), "head"),
    }
    for wrapper, options in WRAPPERS.items():
        cases[f"DDP ({wrapper}), then compiled"] = (
            lambda model, options=options: compiled(DistributedDataParallel(model, **options)),
            "head",
        )
    for name, (wrap, layer) in cases.items():
        for style in (STYLES["calls backward"], STYLES["regularize"]):
            torch.compiler.reset()
            with naming(name, layer):
                check_training(wrap, [layer], style)
    torch.compiler.reset()


@check(2)
def loss_over_all_processes_is_refused() -> None:
    def gathered(z: Tensor, y: Tensor) -> Tensor:
        everyone = torch.cat(torch.distributed.nn.functional.all_gather(z))
        return F.cross_entropy(z @ everyone.T, torch.arange(len(z)))

    def gathered_functionally(z: Tensor, y: Tensor) -> Tensor:
        everyone = all_gather_tensor_autograd(z, 0, dist.group.WORLD)
        return F.cross_entropy(z @ everyone.T, torch.arange(len(z)))

    def reduced(z: Tensor, y: Tensor) -> Tensor:
        return torch.distributed.nn.functional.all_reduce(F.cross_entropy(z, y))

    for loss_fn in (gathered, gathered_functionally, reduced):
        model = Net()
        optimizer = build(model, ["head"])
        with (
            naming(loss_fn.__name__),
            pytest.raises(RuntimeError, match=r"communicates with other processes.*local to the process"),
        ):
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


# FSDP2


def each(mesh: Any, **options: Any) -> Callable[[Net], Net]:
    """Every module in a group of its own, gathered for its own forward and backward only."""

    def shard(model: Net) -> Net:
        for module in (model.body, model.middle, model.after, model.head):
            fully_shard(module, mesh=mesh, **options)
        return fully_shard(model, mesh=mesh, **options)

    return shard


def body(mesh: Any) -> Callable[[Net], Net]:
    """The usual way: blocks in groups of their own, the rest in the root's."""

    def shard(model: Net) -> Net:
        fully_shard(model.body, mesh=mesh)
        fully_shard(model.after, mesh=mesh)
        return fully_shard(model, mesh=mesh)

    return shard


def root(mesh: Any, **options: Any) -> Callable[[Net], Net]:
    return lambda model: fully_shard(model, mesh=mesh, **options)


def plans() -> dict[str, Callable[[Net], Net]]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return {
        "each": each(mesh),
        "each, kept": each(mesh, reshard_after_forward=False),
        "body": body(mesh),
        "root": root(mesh),
        "root, freed": root(mesh, reshard_after_forward=True),
    }


@check(2, 4)
def sharded() -> None:
    """The regularised layer's weight is sharded: with four processes its three rows unevenly."""
    chosen = plans() if dist.get_world_size() == 2 else {"each": plans()["each"], "root": plans()["root"]}
    for name, shard in chosen.items():
        for layers in (["head"], ["middle"], ["middle", "head"]):
            for loss_fn in (F.cross_entropy, squares):
                with naming(name, layers, loss_fn.__name__):
                    check_training(shard, layers, None, loss_fn)


@check(2)
def sharded_styles() -> None:
    for name, shard in plans().items():
        for style_name, style in STYLES.items():
            with naming(name, style_name):
                check_training(shard, ["middle"], style)
                check_training(shard, ["head"], style)


@check(2)
def sharded_settings() -> None:
    for name, shard in plans().items():
        for layers, more in [
            (["head"], {"mode": "full"}),
            (["middle"], {"mode": "full"}),
            (["head"], {"detach_hessian": True}),
            (["middle"], {"detach_hessian": True}),
        ]:
            with naming(name, layers, more):
                check_training(shard, layers, **more)


@check(4)
def hybrid_sharding() -> None:
    """Replicas of sharded models: gradients are reduced along both axes."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    for shard in (each(mesh), root(mesh)):
        for layer in ("head", "middle"):
            with naming(shard.__qualname__, layer):
                check_training(shard, [layer])


@check(2)
def sharded_accumulation() -> None:
    for name, shard in plans().items():
        for layer in ("head", "middle"):
            with naming(name, layer):
                rank = dist.get_rank()
                model = Net()
                shard(model)
                optimizer = build(model, [layer])
                for step in range(2):
                    dealt = shares(step, [2] * 6)[3 * rank : 3 * (rank + 1)]
                    optimizer.zero_grad()
                    for i, (x, y) in enumerate(dealt):
                        model.set_requires_gradient_sync(i == 2)
                        optimizer.regularize(F.cross_entropy(model(x), y) / 3).backward()
                    optimizer.step()
                    assert_weights(model, descended(step + 1, (layer,), n=12), f"weights after step {step}")


@check(2)
def two_forwards_in_one_backward() -> None:
    """The second forward may free what kappa of the first has gathered."""

    def at_once(model: Net, optimizer: FAM, dealt: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        losses = [F.cross_entropy(model(x), y) for x, y in dealt]
        return optimizer.regularize((losses[0] + losses[1]) / 2)

    def one_by_one(model: Net, optimizer: FAM, dealt: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        losses = [optimizer.regularize(F.cross_entropy(model(x), y)) for x, y in dealt]
        return (losses[0] + losses[1]) / 2

    for name, shard in plans().items():
        for layer, loss_of in (("head", at_once), ("middle", at_once), ("head", one_by_one)):
            with naming(name, layer, loss_of.__name__):
                model = Net()
                shard(model)
                optimizer = build(model, [layer])
                for step in range(2):
                    first = 2 * dist.get_rank()
                    optimizer.zero_grad()
                    loss_of(model, optimizer, shares(step, [2] * 4)[first : first + 2]).backward()
                    optimizer.step()
                    assert_weights(model, descended(step + 1, (layer,)), f"weights after step {step}")


@check(2)
def measuring_without_a_backward_leaves_the_model_as_it_was() -> None:
    """kappa gathers weights. The next forward, after they have changed, must gather them anew."""
    for name, shard in plans().items():
        for layer in ("head", "middle"):
            with naming(name, layer):
                rank = dist.get_rank()
                model = Net()
                shard(model)
                optimizer = build(model, [layer])
                for step in range(3):
                    x, y = shares(step, evenly())[rank]
                    observed = model.get_submodule(layer)
                    measured = dataset_relative_flatness(model, observed, F.cross_entropy, [(x, y)])
                    dist.all_reduce(measured)
                    expected = kappa_by_definition(descended(step, (layer,)), layer, *batch(step))
                    assert_close([measured / dist.get_world_size()], [expected], f"kappa before step {step}")
                    regularizes(model, optimizer, x, y)
                    assert_weights(model, descended(step + 1, (layer,)), f"weights after step {step}")


@check(2)
def gradients_zeroed_in_place() -> None:
    def style(run: Any, optimizer: FAM, x: Tensor, y: Tensor) -> None:
        def closure() -> Tensor:
            optimizer.zero_grad(set_to_none=False)
            return F.cross_entropy(run(x), y)

        optimizer.step(closure)

    for name, shard in plans().items():
        with naming(name):
            check_training(shard, ["head"], style)


@check(2)
def frozen_body() -> None:
    for name, shard in plans().items():
        with naming(name):
            model, twin = Net(), Net()
            for net in (model, twin):
                net.body.requires_grad_(False)
            shard(model)
            optimizer = build(model, ["middle"])
            regularizes(model, optimizer, *shares(0, evenly())[dist.get_rank()])
            descend(twin, objective(twin, ["middle"], F.cross_entropy, *batch(0)))
            assert_weights(model, twin, "weights")


@check(2)
def sharded_parameter_is_refused() -> None:
    model = root(init_device_mesh("cpu", (2,)))(Net())
    with pytest.raises(TypeError, match=r"a sharded one.*pass the module that owns it"):
        FAM(model.parameters(), torch.optim.SGD, model.head.weight, mode="hutchinson", lr=LR)


@check(2)
def first_generation_is_refused() -> None:
    for options in ({"use_orig_params": True}, {"use_orig_params": False}):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it is deprecated, and its parameters are not the layer's
            model = FullyShardedDataParallel(Net(), device_id=torch.device("cpu"), **options)
            optimizer = FAM(model.parameters(), torch.optim.SGD, model.module.head, LAM, lr=LR)
        with pytest.raises(TypeError, match=r"\(FSDP1\).*fully_shard"):
            regularizes(model, optimizer, *batch(0))


# Tensor parallelism


@check(2)
def tensor_parallel_before_the_layer() -> None:
    mesh = init_device_mesh("cpu", (2,))
    for loss_fn in (F.cross_entropy, squares):
        for more in ({}, {"detach_hessian": True}, {"mode": "full"}):
            with naming(loss_fn.__name__, more):
                model = Net()
                parallelize_module(model, mesh, {"middle": ColwiseParallel(), "after.1": RowwiseParallel()})
                optimizer = build(model, ["head"], **more)
                for step in range(3):
                    regularizes(model, optimizer, *batch(step), loss_fn)
                    twin = descended(step + 1, ("head",), loss_fn, "detach_hessian" in more)
                    assert_weights(model, twin, f"weights after step {step}")


@check(2)
def tensor_parallel_layer_is_refused() -> None:
    mesh = init_device_mesh("cpu", (2,))
    for plan in (
        ColwiseParallel(),
        ColwiseParallel(output_layouts=Replicate()),
        RowwiseParallel(input_layouts=Replicate()),
    ):
        model = parallelize_module(Net(), mesh, {"head": plan})
        with pytest.raises(TypeError, match=r"tensor parallel.*out of the plan of parallelize_module"):
            build(model, ["head"])
        assert not any("fam_optim" in str(hook) for hook in model.head._forward_hooks.values())
        with pytest.raises(TypeError, match=r"a sharded one.*Tensor parallelism is not supported"):
            FAM(model.parameters(), torch.optim.SGD, model.head.weight, mode="hutchinson", lr=LR)


@check(2)
def weight_distributed_by_hand_is_refused_at_the_first_forward() -> None:
    mesh = init_device_mesh("cpu", (2,))
    model = nn.Linear(4, 4, bias=False)
    model.weight = nn.Parameter(distribute_tensor(model.weight.detach(), mesh, [Shard(0)]))
    optimizer = FAM(model.parameters(), torch.optim.SGD, model, LAM, lr=LR)
    x = distribute_tensor(torch.randn(2, 4), mesh, [Replicate()])
    with pytest.raises(TypeError, match=r"tensor parallel.*out of the plan of parallelize_module"):
        optimizer.step(lambda: model(x).full_tensor().square().sum())


@check(2)
def tensor_parallel_behind_the_layer_is_refused() -> None:
    """torch's second derivatives of DTensor's conversions are wrong without a word."""
    mesh = init_device_mesh("cpu", (2,))
    for layer, plan in {
        "body.0": {"middle": ColwiseParallel(), "after.1": RowwiseParallel()},
        "middle": {"head": ColwiseParallel(output_layouts=Replicate())},
    }.items():
        for more in ({}, {"detach_hessian": True}, {"mode": "hutchinson"}):
            model = parallelize_module(Net(), mesh, plan)
            optimizer = build(model, [layer], **more)
            with pytest.raises(RuntimeError, match=r"TorchTensorBackward.*communicates with other processes"):
                regularizes(model, optimizer, *batch(0))


# Running them


def work(rank: int, world: int, folder: str) -> None:
    """One process: runs the checks, and leaves a file for each that failed."""
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    for function in CHECKS[world]:
        # A process group of its own for each check: one that failed may have left messages unread.
        store = dist.FileStore(os.path.join(folder, f"{function.__name__}.store"), world)
        timeout = datetime.timedelta(seconds=TIMEOUT)
        running = Path(folder, f"{function.__name__}.{rank}.running")
        running.touch()
        try:
            dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timeout)
            torch.manual_seed(0)
            function()
            dist.barrier()
        except BaseException:
            Path(folder, f"{function.__name__}.{rank}.failed").write_text(traceback.format_exc())
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
        running.unlink()
    Path(folder, f"{rank}.done").touch()


@pytest.mark.parametrize("world", CHECKS)
def test_processes(world: int, tmp_path: Path) -> None:
    context = torch.multiprocessing.start_processes(
        work, (world, str(tmp_path)), world, join=False, start_method="spawn"
    )
    deadline = time.monotonic() + 5 * TIMEOUT
    try:
        while not context.join(deadline - time.monotonic()):
            assert time.monotonic() < deadline, f"the processes take more than {5 * TIMEOUT} seconds"
    except Exception as error:  # a process that died leaves no traceback
        running = sorted(path.stem for path in tmp_path.glob("*.running"))
        pytest.fail(f"{error}\nwhile running {', '.join(running)}", pytrace=False)
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()
    failures = {path.stem: path.read_text() for path in sorted(tmp_path.glob("*.failed"))}
    if failures:
        pytest.fail("\n\n".join(f"{name}: {text}" for name, text in failures.items()), pytrace=False)
    assert len(list(tmp_path.glob("*.done"))) == world
