"""Losses that contain a derivative: right where it was taken behind the layer, refused where it went through.

Through the layer it multiplies with the layer's weight once more, beside the layer's output; only the weight
itself, named as the layer, sees both.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fam_optim import FAM, observe, relative_flatness
from tests import reference
from tests.sandwich import COMPUTED, MODES, Sandwich, check, data, pruned
from tests.support import LAM, LR, seeded

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.usefixtures("float64")

THROUGH = r"derivative.* through `layer` .*Pass the weight itself.*mode='hutchinson' or mode='full'"


def gradient_penalty(model: nn.Module, at: str) -> Tensor:
    """The cross-entropy and the square of its gradient, in the input or in something behind the layer."""
    x, y = data()
    x.requires_grad_()
    z = model.layer(model.body(x))
    h = model.tail[0](z)
    loss = F.cross_entropy(model.tail[1:](h), y)
    (gradient,) = torch.autograd.grad(loss, {"x": x, "z": z, "h": h}[at], create_graph=True)
    return loss + 10 * gradient.square().sum()


@MODES
@pytest.mark.parametrize("at", ["z", "h"])
@pytest.mark.parametrize(
    "make", [nn.Linear, COMPUTED["weight_norm"], pruned], ids=["", "weight_norm", "pruned"]
)
def test_behind_the_layer(make: Callable[[int, int], nn.Module], at: str, mode: str) -> None:
    check(partial(Sandwich, make=make), partial(gradient_penalty, at=at), mode=mode)


class Critic(nn.Module):
    """body -> layer -> tail, whose layers may be of any kind and whose activation of any derivative."""

    def __init__(self, kind: str, act: Callable[[Tensor], Tensor], head: bool, frozen: bool) -> None:
        super().__init__()
        size = 1 if head else 4
        make: dict[str, Callable[[], nn.Module]] = {
            "linear": lambda: nn.Linear(6, size),
            "linear without bias": lambda: nn.Linear(6, size, bias=False),
            "convolution": lambda: nn.Conv1d(2, size, 3),
            "transposed convolution": lambda: nn.ConvTranspose1d(2, size, 2),
            "weight_norm": lambda: COMPUTED["weight_norm"](6, size),
            "pruned": lambda: pruned(6, size),
        }
        self.body, self.layer, self.act, self.head = nn.Linear(6, 6), make[kind](), act, head
        self.layer.requires_grad_(not frozen)
        self.shape = (2, 3) if "convolution" in kind else (6,)

    def forward(self, x: Tensor) -> Tensor:
        z = self.layer(self.act(self.body(x)).unflatten(1, self.shape))
        return z if self.head else self.act(z)


def penalised(model: nn.Module) -> Tensor:
    """As of a Wasserstein critic."""
    x = torch.randn(5, 6).requires_grad_()
    value = model(x).flatten(1).mean(1)
    (slope,) = torch.autograd.grad(value.sum(), x, create_graph=True)
    return (slope.norm(dim=1) - 1).square().mean() - value.mean()


KINDS = ["linear", "linear without bias", "convolution", "transposed convolution", "weight_norm", "pruned"]


@pytest.mark.parametrize("mode", ["exact", "full", "hutchinson"])
@pytest.mark.parametrize("act", [torch.tanh, torch.sin, F.leaky_relu], ids=["tanh", "sin", "leaky_relu"])
@pytest.mark.parametrize("head", [False, True], ids=["middle", "head"])
@pytest.mark.parametrize("kind", KINDS)
def test_through_the_layer(kind: str, head: bool, act: Callable[[Tensor], Tensor], mode: str) -> None:
    model = seeded(lambda: Critic(kind, act, head, frozen=False))
    with observe(model.layer) as layer:
        loss = penalised(model)
    with pytest.raises(RuntimeError, match=THROUGH):
        relative_flatness(loss, layer, mode=mode)
    with observe(model.layer) as layer:
        loss = model(torch.randn(5, 6)).square().mean()
    assert relative_flatness(loss, layer, mode=mode).isfinite(), "the same model without it"


@pytest.mark.parametrize("kind", ["linear", "convolution", "linear without bias"])
def test_through_a_frozen_layer(kind: str) -> None:
    model = seeded(lambda: Critic(kind, torch.sin, False, frozen=True))
    with observe(model.layer) as layer:
        loss = penalised(model)
    with pytest.raises(RuntimeError, match=THROUGH):
        relative_flatness(loss, layer)
    with observe(model.layer) as layer:
        loss = model(torch.randn(5, 6)).square().mean()
    assert relative_flatness(loss, layer, mode="hutchinson").isfinite()


@pytest.mark.parametrize("head", [False, True], ids=["middle", "head"])
@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_the_remedy(kind: str, head: bool) -> None:
    """The weight itself: right by the definition, which sees every use of it."""
    model = seeded(lambda: Critic(kind, torch.sin, head, frozen=False))
    weight = model.layer.weight
    torch.manual_seed(1)
    loss = penalised(model)
    (g,) = torch.autograd.grad(loss, weight, create_graph=True)
    rows = [torch.autograd.grad(entry, weight, retain_graph=True)[0] for entry in g.flatten()]
    d, m = weight.flatten(1).shape
    traces = torch.einsum("stut->su", torch.stack(rows).reshape(d, m, d, m))
    expected = ((weight.flatten(1) @ weight.flatten(1).T) * traces).sum()
    kappa = relative_flatness(loss, weight, mode="full")
    torch.testing.assert_close(kappa, expected, rtol=1e-10, atol=0)
    draws = relative_flatness(loss, weight, mode="hutchinson", n_samples=400)
    assert (draws / kappa - 1).abs() < 1, "of the same size"


def test_no_false_refusals() -> None:
    """Tied weights; a derivative that does not go through; one of another call's; one that is dropped."""
    torch.manual_seed(0)
    layer, x = nn.Linear(4, 4), torch.randn(3, 4, requires_grad=True)
    losses = {
        "tied": lambda: layer(x).sin().square().mean() + layer.weight.T.norm(),
        "tied, decoded with": lambda: (layer(x).tanh() @ layer.weight).square().mean(),
        "orthogonal": lambda: layer(x).sin().mean() + _gram(layer.weight.view(4, -1)).square().sum(),
        "orthogonal copies": lambda: layer(x).sin().mean() + _gram(layer.weight.clone()).norm(),
        "in the bias": lambda: _with_gradient(layer(x).sin().sum(), layer.bias),
        "in the weight": lambda: _with_gradient(layer(x).sin().sum(), layer.weight),
        "dropped": lambda: layer(x).sin().mean() + 0 * len(_gradient(layer(x).sin().sum(), x)),
        "of what comes before": lambda: layer(_gradient(x.sin().sum(), x)).sin().mean(),
    }
    for name, loss_of in losses.items():
        with observe(layer) as seen:
            loss = loss_of()
        expected = reference.sum_of_kappas(reference.curvatures(loss_of, [layer]), "neuronwise")
        kappa = relative_flatness(loss, seen, mode="full")
        torch.testing.assert_close(kappa, expected, rtol=1e-9, atol=1e-14, msg=name)


def _gram(w: Tensor) -> Tensor:
    return w @ w.t() - torch.eye(len(w))


def test_convolutions_with_a_derivative_in_the_weight() -> None:
    torch.manual_seed(0)
    layer, x = nn.Conv1d(2, 2, 2), torch.randn(3, 2, 4, requires_grad=True)
    with observe(layer) as seen:
        loss = _with_gradient(layer(x).sin().sum(), layer.weight)
    assert relative_flatness(loss, seen).isfinite()


def _gradient(value: Tensor, at: Tensor) -> Tensor:
    return torch.autograd.grad(value, at, create_graph=True)[0]


def _with_gradient(value: Tensor, at: Tensor) -> Tensor:
    return value + _gradient(value, at).square().sum()


@pytest.mark.parametrize("at", ["x", "z"])
def test_gradient_penalty_through_layer_norm_is_refused(at: str) -> None:
    model = seeded(Sandwich)
    model.tail.insert(1, nn.LayerNorm(4))
    for layer in (model.layer, model.layer.weight):
        fam = FAM(model.parameters(), torch.optim.SGD, layer, LAM, "full", lr=LR)
        with pytest.raises(RuntimeError, match=r"derivative through nn.LayerNorm.*elementary operations"):
            fam.regularize(gradient_penalty(model, at))
