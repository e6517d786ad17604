"""Losses that contain a derivative: through the layer, it multiplies with the layer's weight once more."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fam_optim import FAM, observe, relative_flatness
from tests.sandwich import COMPUTED, MODES, Sandwich, check, data, fam_on, pruned, two_calls
from tests.support import LAM, LR, seeded

pytestmark = pytest.mark.usefixtures("float64")


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
@pytest.mark.parametrize("at", ["x", "z", "h"])
@pytest.mark.parametrize(
    "make", [nn.Linear, COMPUTED["weight_norm"], pruned], ids=["", "weight_norm", "pruned"]
)
def test_gradient_penalty(make: Callable[[int, int], nn.Module], at: str, mode: str) -> None:
    """Taken through the layer, the gradient multiplies with its weight once more."""
    check(partial(Sandwich, make=make), partial(gradient_penalty, at=at), mode=mode)


def test_gradient_penalty_in_hutchinson_averages_to_kappa() -> None:
    model = seeded(Sandwich)
    with observe(model.layer) as layer:
        loss = gradient_penalty(model, "x")
    kappa = relative_flatness(loss, layer, mode="full")
    settings: dict[str, Any] = {"mode": "hutchinson", "n_samples": 50}
    estimates = torch.stack([relative_flatness(loss, layer, **settings) for _ in range(20)]).detach()
    error = (estimates.mean() - kappa).abs() / (estimates.std() / 20**0.5)
    assert error < 4, f"{error:.1f} standard errors from {kappa}"


def test_gradient_penalty_through_a_weight_that_cannot_be_followed() -> None:
    def twice(model: nn.Module) -> Tensor:
        return gradient_penalty(model, "x") + two_calls(model)

    message = r"`loss` contains a derivative.*frozen.*requires_grad_\(\).*parametrize.cached\(\)"
    frozen = seeded(Sandwich)
    frozen.layer.requires_grad_(False)
    with pytest.raises(RuntimeError, match=message):
        fam_on(frozen).step(lambda: gradient_penalty(frozen, "x"))
    computed = seeded(partial(Sandwich, make=COMPUTED["weight_norm"]))
    with pytest.raises(RuntimeError, match=message):
        fam_on(computed).step(lambda: twice(computed))
    # the remedies
    frozen.layer.requires_grad_(True)
    trained = [p for name, p in frozen.named_parameters() if name != "layer.weight"]
    with pytest.warns(UserWarning, match="not among the parameters given to FAM"):
        fam = FAM(trained, torch.optim.SGD, frozen.layer, LAM, lr=LR)
    before = frozen.layer.weight.detach().clone()
    fam.step(lambda: gradient_penalty(frozen, "x"))
    assert torch.equal(frozen.layer.weight, before)

    def cached(model: nn.Module) -> Tensor:
        with parametrize.cached():
            return twice(model)

    check(partial(Sandwich, make=COMPUTED["weight_norm"]), cached, mode="full")


def test_gradient_penalty_through_a_transposed_convolution_is_refused() -> None:
    layer = nn.ConvTranspose1d(2, 3, 2)
    fam = FAM(layer.parameters(), torch.optim.SGD, layer, LAM, lr=LR)
    x = torch.randn(4, 2, 3, requires_grad=True)
    z = layer(x).tanh()
    (gradient,) = torch.autograd.grad(z.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"through `layer` ConvTranspose1d.*does not support"):
        fam.regularize(z.square().sum() + gradient.square().sum())


@pytest.mark.parametrize("at", ["x", "z"])
def test_gradient_penalty_through_layer_norm_is_refused(at: str) -> None:
    model = seeded(Sandwich)
    model.tail.insert(1, nn.LayerNorm(4))
    for layer in (model.layer, model.layer.weight):
        fam = FAM(model.parameters(), torch.optim.SGD, layer, LAM, "full", lr=LR)
        with pytest.raises(RuntimeError, match=r"derivative through nn.LayerNorm.*elementary operations"):
            fam.regularize(gradient_penalty(model, at))
