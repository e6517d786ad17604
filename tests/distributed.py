"""Checks that several processes make together, and the problem they train on, with one process as the judge.

A test under `processes` is called in every one of a set of processes (gloo, on the CPU, float64). A set makes
one check after another, as the second of a kind takes a fraction of the first's time; one in which a check
has failed, died or hung is not used again. Sets are forked from a server that has imported torch already.
"""

from __future__ import annotations

import copy
import faulthandler
import gc
import inspect
import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache, partial, wraps
from multiprocessing.connection import Connection, wait
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from fam_optim import FAM
from tests import reference
from tests.support import TORCH, Style, assert_close

LAM, LR = 0.05, 0.1

# Running a check in processes

LIMIT = 120.0  # seconds for a check
GRACE = 5.0  # seconds for the other processes, once it has failed in one
PRELOAD = [__name__, "torch._dynamo", "torch.distributed.fsdp", "torch.distributed.tensor.parallel"]


class Processes:
    """So many processes, forked, that are ready for a check."""

    def __init__(self, world: int) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        self.folder = TemporaryDirectory()
        self.members = []
        for rank in range(world):
            pipe, its_end = context.Pipe()
            process = context.Process(
                target=serve, args=(its_end, self.folder.name, rank, world), daemon=True
            )
            process.start()
            its_end.close()
            self.members.append((pipe, process))

    def run(
        self, check: Callable[..., None], arguments: dict[str, Any], limit: float = LIMIT
    ) -> dict[int, str]:
        """Makes the check, for at most so many seconds. Returns what went wrong, by process."""
        for pipe, _ in self.members:
            pipe.send((check, arguments))
        failures = {}
        running = {pipe: rank for rank, (pipe, _) in enumerate(self.members)}
        deadline = time.monotonic() + limit
        while running and (answers := wait(list(running), max(0, deadline - time.monotonic()))):
            for pipe in answers:
                rank = running.pop(pipe)
                try:
                    failure = pipe.recv()
                except (EOFError, ConnectionResetError):
                    failure = f"has died: {self.end(rank)}"
                if failure:
                    failures[rank] = failure
                    deadline = min(deadline, time.monotonic() + GRACE)
        for rank in running.values():
            failures[rank] = f"does not come to an end: {self.end(rank)}"
        if failures:
            for _, process in self.members:
                process.kill()
        return failures

    def end(self, rank: int) -> str:
        """How a process has died, or does now, and where it was."""
        process = self.members[rank][1]
        process.terminate()
        process.join(GRACE)
        return f"exit code {process.exitcode}\n{stack(self.folder.name, rank).read_text()}"


def serve(pipe: Connection, folder: str, rank: int, world: int) -> None:
    """One process: answers every check with None or the traceback, until the tests are over."""
    where = stack(folder, rank).open("w")
    faulthandler.enable(where)  # for one that crashes
    faulthandler.register(signal.SIGTERM, where, chain=True)  # for one that hangs and is ended
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    gc.freeze()  # what is imported is no garbage
    store = dist.FileStore(os.path.join(folder, "store"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    with suppress(EOFError):
        while True:
            check, arguments = pipe.recv()
            try:
                forget()
                inspect.unwrap(check)(**arguments)
                dist.barrier()
            except BaseException:
                pipe.send(traceback.format_exc())
            else:
                pipe.send(None)


def forget() -> None:
    """No check finds what another has left."""
    torch.manual_seed(0)
    torch.compiler.reset()


def stack(folder: str, rank: int) -> Path:
    """The file in which a process that dies leaves where it was."""
    return Path(folder, f"{rank}.stack")


IDLE: dict[int, Processes] = {}


def processes(*worlds: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Makes the test run in so many processes, one item for each number; where none is given, `world` is an
    argument that the test is parametrised by. The others are pickled."""

    def decorate(check: Callable[..., None]) -> Callable[..., None]:
        @wraps(check)
        def test(world: int, **arguments: Any) -> None:
            chosen = IDLE.pop(world, None) or Processes(world)
            failures = chosen.run(test, arguments)
            if failures:
                texts = [f"process {rank}: {text}" for rank, text in sorted(failures.items())]
                pytest.fail("\n".join(texts), pytrace=False)
            IDLE[world] = chosen

        signature = inspect.signature(check)
        first = inspect.Parameter("world", inspect.Parameter.POSITIONAL_OR_KEYWORD)
        parameters = [first, *signature.parameters.values()]
        test.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        if not worlds:
            return test
        return pytest.mark.parametrize("world", worlds, ids=[f"{world} processes" for world in worlds])(test)

    return decorate


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


# Ways to spread it over processes

Wrap = Callable[[Net], Any]

DDP: dict[str, Wrap] = {
    "plain": DistributedDataParallel,
    "bucket view": partial(DistributedDataParallel, gradient_as_bucket_view=True),
    "find_unused_parameters": partial(DistributedDataParallel, find_unused_parameters=True),
    "static_graph": partial(DistributedDataParallel, static_graph=True),
}


def everyone() -> Any:
    return init_device_mesh("cpu", (dist.get_world_size(),))


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


FSDP_RUNS = TORCH >= (2, 7)
"""torch 2.6's FSDP2 does not run on the CPU: its streams there record no events."""

FSDP: dict[str, Wrap] = {
    "each": each,
    "each, kept": partial(each, reshard_after_forward=False),
    "body": body,
    "root": root,
    "root, freed": partial(root, reshard_after_forward=True),
}


def compiled(model: Any) -> Any:
    return torch.compile(model, backend="aot_eager")


# Its batches, and the answer of one process


def batch(step: int, n: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(n, 5, generator=generator), torch.randint(0, 3, (n,), generator=generator)


def shares(step: int, sizes: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
    """The batch as it is dealt out to the processes."""
    x, y = batch(step, sum(sizes))
    return list(zip(x.split(list(sizes)), y.split(list(sizes)), strict=True))


def evenly() -> list[int]:
    return [8 // dist.get_world_size()] * dist.get_world_size()


def share(step: int) -> tuple[Tensor, Tensor]:
    """This process's part of the batch."""
    return shares(step, evenly())[dist.get_rank()]


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


def check_training(
    wrap: Wrap,
    layers: Sequence[str],
    style: Style = regularizes,
    loss_fn: Callable[..., Tensor] = F.cross_entropy,
    unused: bool = False,
    **settings: Any,
) -> None:
    """Three steps on this process's share of the batches, against one process on all of them."""
    model = Net(unused)
    run = wrap(model)
    optimizer = build(model, layers, **settings)
    for step in range(3):
        style(run, optimizer, *share(step), loss_fn)
        twin = descended(step + 1, tuple(layers), loss_fn, settings.get("detach_hessian", False))
        assert_weights(model, twin, f"weights after step {step}")


def check_gauss_newton(wrap: Wrap, **settings: Any) -> None:
    """Three steps with Gauss-Newton curvature at two layers, against one process on the whole batches."""
    model, twin = Net(), Net()
    run, layers = wrap(model), ("middle", "head")
    optimizer, alone = (build(m, layers, curvature="gauss_newton", **settings) for m in (model, twin))
    for step in range(3):
        regularizes(run, optimizer, *share(step))
        x, y = batch(step)
        alone.zero_grad()
        alone.regularize(F.cross_entropy(twin(x), y)).backward()
        alone.step()
        assert_weights(model, twin, f"weights after step {step}")
