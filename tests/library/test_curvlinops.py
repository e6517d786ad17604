"""kappa against curvatures that others wrote: curvlinops' Hessian (forward over reverse) and GGN operators.

https://github.com/f-dangel/curvlinops, a requirement of the tests only.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest
import torch
from curvlinops import GGNLinearOperator, HessianLinearOperator
from torch import Tensor, nn

from fam_optim import dataset_relative_flatness, observe, relative_flatness
from tests import reference

if TYPE_CHECKING:
    from collections.abc import Callable

TOLERANCE = 1e-9


@dataclass(frozen=True)
class Oracle:
    """A chain of modules, which of them is asked for, its data and its loss.

    Attributes:
        shape: the shape of one sample.
        targets: makes as many targets as it is told.
        at: the layer's index in the chain.
    """

    name: str
    modules: Callable[[], tuple[nn.Module, ...]] = field(repr=False)
    shape: tuple[int, ...]
    loss: nn.Module = field(repr=False)
    targets: Callable[[int], Tensor] = field(repr=False)
    at: int = 0

    def __str__(self) -> str:
        return self.name

    def network(self) -> nn.Sequential:
        return nn.Sequential(*self.modules()).double().eval()

    def batch(self, n: int) -> tuple[Tensor, Tensor]:
        return torch.randn(n, *self.shape, dtype=torch.float64), self.targets(n)


def classes(n: int) -> Tensor:
    return torch.randint(3, (n,))


def values(n: int) -> Tensor:
    return torch.randn(n, 3, dtype=torch.float64)


def binary(n: int) -> Tensor:
    return torch.randint(2, (n, 3)).double()


def mlp() -> tuple[nn.Module, ...]:
    return nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)


def normed() -> tuple[nn.Module, ...]:
    return nn.Linear(4, 5), nn.LayerNorm(5), nn.GELU(), nn.BatchNorm1d(5), nn.Linear(5, 3)


def convolutional() -> tuple[nn.Module, ...]:
    head = nn.Flatten(), nn.Linear(12, 3)
    return nn.Conv2d(2, 3, 2, stride=2, padding=1), nn.BatchNorm2d(3), nn.Tanh(), *head


def grouped() -> tuple[nn.Module, ...]:
    conv = nn.Conv1d(2, 4, 2, padding=1, padding_mode="circular", groups=2)
    return conv, nn.Sigmoid(), nn.Flatten(), nn.Linear(16, 3)


CE, MSE = nn.CrossEntropyLoss, nn.MSELoss
ORACLES = [
    Oracle("mlp_last-ce", mlp, (4,), CE(), classes, at=4),
    Oracle("mlp_last-ce_sum", mlp, (4,), CE(reduction="sum"), classes, at=4),
    Oracle("mlp_last-ce_smoothing", mlp, (4,), CE(label_smoothing=0.2), classes, at=4),
    Oracle("mlp_last-mse", mlp, (4,), MSE(), values, at=4),
    Oracle("mlp_last-bce", mlp, (4,), nn.BCEWithLogitsLoss(), binary, at=4),
    Oracle("mlp_middle-ce", mlp, (4,), CE(), classes, at=2),
    Oracle("mlp_first-ce", mlp, (4,), CE(), classes),
    Oracle("mlp_first-mse_sum", mlp, (4,), MSE(reduction="sum"), values),
    Oracle("normed_first-ce", normed, (4,), CE(), classes),
    Oracle("normed_first-bce", normed, (4,), nn.BCEWithLogitsLoss(), binary),
    Oracle("normed_last-ce", normed, (4,), CE(), classes, at=4),
    Oracle("conv-ce", convolutional, (2, 3, 3), CE(), classes),
    Oracle("conv_head-ce", convolutional, (2, 3, 3), CE(), classes, at=4),
    Oracle("conv_groups-mse", grouped, (2, 3), MSE(), values),
]

oracles = pytest.mark.parametrize("oracle", ORACLES, ids=str)
measures = pytest.mark.parametrize("measure", reference.MEASURES)
curvatures = pytest.mark.parametrize("curvature", ["hessian", "gauss_newton"])
OPERATORS = {"hessian": HessianLinearOperator, "gauss_newton": GGNLinearOperator}
MODES = ("exact", "full")


def kappa_of(operator: HessianLinearOperator | GGNLinearOperator, weight: Tensor, measure: str) -> float:
    """<F F^T, T> from the operator's dense matrix."""
    d, m = weight.flatten(1).shape
    dense = operator @ torch.eye(d * m, dtype=torch.float64)
    traces = dense.reshape(d, m, d, m).diagonal(dim1=1, dim2=3).sum(-1)
    rows = weight.detach().flatten(1)
    gram = rows @ rows.T if measure == "neuronwise" else rows.square().sum() * torch.eye(d, dtype=rows.dtype)
    return (gram * traces).sum().item()


def check(got: Tensor, wanted: float, what: str) -> None:
    error = abs(got.item() - wanted) / abs(wanted)
    assert error <= TOLERANCE, (
        f"{what}: kappa {got.item():.12g}, by curvlinops {wanted:.12g}, error {error:.1e}"
    )


@curvatures
@measures
@oracles
def test_batch(oracle: Oracle, measure: str, curvature: str) -> None:
    net, (x, y) = oracle.network(), oracle.batch(4)
    weight = net[oracle.at].weight
    wanted = kappa_of(OPERATORS[curvature](net, oracle.loss, [weight], [(x, y)]), weight, measure)
    with observe(net[oracle.at]) as layer:
        loss = oracle.loss(net(x), y)
    for mode in MODES:
        value = relative_flatness(loss, layer, measure=measure, mode=mode, curvature=curvature)
        check(value, wanted, f"{oracle}, {measure}, {mode}, {curvature}")


@curvatures
@measures
@pytest.mark.parametrize("oracle", [o for o in ORACLES if o.loss.reduction == "mean"], ids=str)
def test_data_set(oracle: Oracle, measure: str, curvature: str) -> None:
    """Three batches, the last one smaller."""
    net, loader = oracle.network(), [oracle.batch(n) for n in (3, 3, 2)]
    layer = net[oracle.at]
    operator = OPERATORS[curvature](net, oracle.loss, [layer.weight], loader)
    wanted = kappa_of(operator, layer.weight, measure)
    for mode in MODES:
        value = dataset_relative_flatness(
            net, layer, oracle.loss, loader, measure=measure, mode=mode, curvature=curvature
        )
        check(value, wanted, f"{oracle}, {measure}, {mode}, {curvature}")
