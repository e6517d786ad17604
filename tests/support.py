"""What test files share: a small network and its data, ways to take a step, and the answers by definition."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from heapq import heapify, heappop, heappush
from itertools import combinations, product
from typing import Any, Literal, TypeVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fam_optim.layer.use import LayerUse
from tests import reference

LAM, LR = 0.05, 0.1
ROUNDING = 1e-12
"""Of a single step. Several steps may be off by a little more."""

TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])
"""The version that is tested, as (2, 14): what an older one lacks is skipped."""

Batch = tuple[Tensor, Tensor]
LossFunction = Callable[..., Tensor]
Made = TypeVar("Made")
Item = TypeVar("Item")


def recorded_calls(module: nn.Module) -> list[LayerUse]:
    """The calls of a module of which anything is kept, by whomever."""
    alive = [o for o in gc.get_objects() if issubclass(type(o), LayerUse)]  # isinstance asks weak proxies
    return [use for use in alive if use.module() is module and hasattr(use, "phi")]


@contextmanager
def warnings_as(action: Literal["error", "ignore"]) -> Iterator[None]:
    """What is warned of meanwhile is an error, or nothing. (catch_warnings takes it from Python 3.11 on.)"""
    with warnings.catch_warnings():
        warnings.simplefilter(action)
        yield


# ---------------------------------------------------------------------------------- networks and data


def seeded(make: Callable[[], Made], seed: int = 0) -> Made:
    """The same at every call. The random numbers that follow are as if there had been none."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make()


def covering(items: Iterable[Item], shown: Callable[[Item], Iterable[object]]) -> list[Item]:
    """A few of the items that together show what all show: each adds the most to those before it."""
    listed = list(items)
    missing = [set(shown(item)) for item in listed]
    queue = [(-len(new), i) for i, new in enumerate(missing)]
    heapify(queue)
    seen: set[object] = set()
    chosen = []
    while queue:
        added, i = heappop(queue)
        missing[i] -= seen
        if len(missing[i]) == -added:
            chosen.append(listed[i])
            seen |= missing[i]
        elif missing[i]:
            heappush(queue, (-len(missing[i]), i))
    return chosen


def crossed(*axes: Iterable[Any], by: int) -> list[tuple[Any, ...]]:
    """Combinations of the axes' values in which any values of `by` axes meet."""
    return covering(product(*axes), lambda chosen: combinations(enumerate(chosen), by))


BODIES: dict[str, Callable[[], list[nn.Module]]] = {
    "tanh": lambda: [nn.Linear(5, 6), nn.Tanh()],
    "relu": lambda: [nn.Linear(5, 6), nn.ReLU(inplace=True)],
    # No bias before BatchNorm: its gradient is zero but for rounding, which Adam would blow up.
    "batch norm": lambda: [nn.Linear(5, 6, bias=False), nn.BatchNorm1d(6), nn.ReLU(inplace=True)],
}


class Net(nn.Module):
    """A classifier: a body, and the head, which most tests regularise."""

    def __init__(self, body: str = "tanh", seed: int = 0) -> None:
        super().__init__()
        self.body, self.head = seeded(lambda: (nn.Sequential(*BODIES[body]()), nn.Linear(6, 3)), seed)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def samples(seed: int, n: int, classes: int = 3, dtype: torch.dtype | None = None) -> Batch:
    """n samples of 5 features, with their classes."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 5, generator=generator, dtype=dtype)
    return x, torch.randint(classes, (n,), generator=generator)


def batch(step: int, n: int = 8) -> Batch:
    """One for every step of a loop."""
    return samples(100 + step, n)


BATCH = 6
"""The size of a loader's batches."""


def dataset(batches: int) -> TensorDataset:
    """The first of always the same batches, in the form that frameworks take."""
    x, y = samples(1, 60)
    return TensorDataset(x[: BATCH * batches], y[: BATCH * batches])


def loader(batches: int = 4) -> DataLoader[Any]:
    return DataLoader(dataset(batches), batch_size=BATCH)


def micro_batches(batches: Iterable[Batch], size: int) -> list[list[Batch]]:
    """Those of each optimizer step."""
    listed = list(batches)
    return [listed[i : i + size] for i in range(0, len(listed), size)]


# --------------------------------------------------------------------------------- styles of one step


def returns_loss(
    model: nn.Module, optimizer: Any, x: Tensor, y: Tensor, loss_fn: LossFunction = F.cross_entropy
) -> Any:
    """The closure leaves backward to FAM."""

    def closure() -> Tensor:
        optimizer.zero_grad()
        return loss_fn(model(x), y)

    return optimizer.step(closure)


def calls_backward(
    model: nn.Module,
    optimizer: Any,
    x: Tensor,
    y: Tensor,
    loss_fn: LossFunction = F.cross_entropy,
    between: Callable[[], Any] = lambda: None,
) -> Any:
    """The closure calls backward itself."""

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_fn(model(x), y)
        loss.backward()
        between()
        return loss

    return optimizer.step(closure)


def regularizes(
    model: nn.Module,
    optimizer: Any,
    x: Tensor,
    y: Tensor,
    loss_fn: LossFunction = F.cross_entropy,
    between: Callable[[], Any] = lambda: None,
) -> Any:
    """No closure."""
    optimizer.zero_grad()
    loss = loss_fn(model(x), y)
    optimizer.regularize(loss).backward()
    between()
    optimizer.step()
    return loss


Style = Callable[..., Any]
STYLES: dict[str, Style] = {
    "returns loss": returns_loss,
    "calls backward": calls_backward,
    "regularize": regularizes,
}
by_style = pytest.mark.parametrize("style", STYLES.values(), ids=STYLES)


# ---------------------------------------------------------------------------------------- comparisons

Tensors = nn.Module | Iterable[Tensor]


def named(tensors: Tensors) -> list[tuple[str, Tensor]]:
    """A module's parameters and buffers, or what is listed, by number."""
    if isinstance(tensors, nn.Module):
        return list(tensors.state_dict().items())
    return [(str(i), t) for i, t in enumerate(tensors)]


def assert_close(actual: Tensors, expected: Tensors, what: str = "weights", tolerance: float = 1e-10) -> None:
    """Each tensor's error is within the tolerance, relative to its norm."""
    for (name, a), (_, e) in zip(named(actual), named(expected), strict=True):
        error = ((a - e).double().norm() / e.double().norm().clamp_min(1e-300)).item()
        assert error <= tolerance, f"{what}, {name}: relative error {error:.1e}"


def assert_same(actual: Tensors, expected: Tensors, what: str = "weights") -> None:
    """Equal to the last bit."""
    for (name, a), (_, e) in zip(named(actual), named(expected), strict=True):
        assert torch.equal(a, e), f"{what}, {name}: differs by {(a - e).abs().max():.1e}"


def gradients(model: nn.Module) -> list[Tensor]:
    """Copies of those that are there."""
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


# -------------------------------------------------------------------------- the answers by definition


def true_kappa(
    loss: Callable[[], Tensor], *layers: nn.Module | nn.Parameter, measure: str = "neuronwise"
) -> Tensor:
    """By its definition, differentiable."""
    return reference.sum_of_kappas(reference.curvatures(loss, layers, create_graph=True), measure)


def penalised(loss: Callable[[], Tensor], *layers: nn.Module, lam: float = LAM) -> Tensor:
    """loss + lam * kappa by its definition, from one forward."""
    values = []

    def kept() -> Tensor:
        values.append(loss())
        return values[0]

    kappa = true_kappa(kept, *layers)
    return values[0] + lam * kappa


def set_gradients(value: Tensor, parameters: Iterable[nn.Parameter]) -> None:
    """Those of value, in place of what is there."""
    listed = list(parameters)
    for p, g in zip(listed, reference.gradient(value, listed), strict=True):
        p.grad = g


def plain_step(model: Net, base: torch.optim.Optimizer, x: Tensor, y: Tensor, lam: float = LAM) -> Tensor:
    """One step of the base on the plain mathematical answer."""

    def loss() -> Tensor:
        return F.cross_entropy(model(x), y)

    set_gradients(penalised(loss, model.head, lam=lam), model.parameters())
    base.step()
    return loss()


SGD = {"lr": LR, "momentum": 0.9, "weight_decay": 1e-3}


def cross_entropy_of(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def by_hand(
    batches: Iterable[Batch],
    accumulate: int = 1,
    clip: float | None = None,
    make: Callable[..., torch.optim.Optimizer] = torch.optim.SGD,
    schedule: Callable[..., Any] | None = None,
    loss_of: Callable[[nn.Module, Batch], Tensor] = cross_entropy_of,
    **kwargs: Any,
) -> nn.Module:
    """What a framework's loop must end in: a network with BatchNorm after steps on the plain answer."""
    model = Net("batch norm")
    optimizer = make(model.parameters(), **(kwargs or SGD))
    scheduler = schedule(optimizer) if schedule else None
    for group in micro_batches(batches, accumulate):
        optimizer.zero_grad()
        for batch in group:
            (penalised(partial(loss_of, model, batch), model.head) / len(group)).backward()
        if clip is not None:
            norm = nn.utils.clip_grad_norm_(model.parameters(), clip)
            assert norm > 1.5 * clip, "clipping that does not clip proves nothing"
        optimizer.step()
        if scheduler:
            scheduler.step()
    return model


def without_penalty(batches: Iterable[Batch], accumulate: int = 1) -> nn.Module:
    """The same from the loss alone."""
    model = Net("batch norm")
    optimizer = torch.optim.SGD(model.parameters(), **SGD)
    for group in micro_batches(batches, accumulate):
        optimizer.zero_grad()
        for batch in group:
            (cross_entropy_of(model, batch) / len(group)).backward()
        optimizer.step()
    return model


def assert_regularisation_matters(batches: Iterable[Batch], model: nn.Module, accumulate: int = 1) -> None:
    """That the plain answer differs from a run without penalty by far more than the tolerance."""
    plain = without_penalty(batches, accumulate)
    assert (plain.head.weight - model.head.weight).norm() > 1e-3 * model.head.weight.norm()
