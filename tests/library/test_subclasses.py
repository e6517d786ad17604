"""Layers that override their class's forward: taken if they compute the same, refused if they do not."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fam_optim import FAM, observe, relative_flatness
from tests import reference
from tests.support import warnings_as

if TYPE_CHECKING:
    from collections.abc import Callable


class Same(nn.Linear):
    """As timm's: the class's own line, written again."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight, self.bias)


class SameConvolution(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, self.weight, self.bias)


class Rounded(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight.round(), self.bias)


class StraightThrough(nn.Linear):
    """Fake quantisation whose weight lies on the grid: the same numbers, by other operations."""

    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight + (self.weight.round() - self.weight).detach()
        return F.linear(input, weight, self.bias)


class BehindTheGraph(nn.Linear):
    """The same operations, and other numbers."""

    def forward(self, input: Tensor) -> Tensor:
        z = F.linear(input, self.weight, self.bias)
        z.data = z.data.round()
        return z


class Dropped(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return F.dropout(F.linear(input, self.weight, self.bias), 0.5)


class Standardised(nn.Conv2d):
    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(input, weight - weight.mean((1, 2, 3), keepdim=True), bias)


def quantisation_aware(m: int = 4, d: int = 3) -> nn.Module:
    with warnings_as("ignore"):
        from torch.ao.nn.qat import Linear
        from torch.ao.quantization import get_default_qat_qconfig

        return Linear(m, d, qconfig=get_default_qat_qconfig())


def quantisation_aware_convolution() -> nn.Module:
    with warnings_as("ignore"):
        from torch.ao.nn.intrinsic.qat import ConvReLU2d
        from torch.ao.quantization import get_default_qat_qconfig

        return ConvReLU2d(2, 3, 2, qconfig=get_default_qat_qconfig())


def loss_of(layer: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    shape = (5, 4) if isinstance(layer, nn.Linear) else (5, 2, 3, 3)
    z: Tensor = layer(torch.randn(shape, generator=generator).to(layer.weight.dtype))  # type: ignore[union-attr]
    return F.cross_entropy(z.flatten(2).mean(2) if z.dim() > 2 else z, torch.tensor([0, 1, 2, 0, 1]))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("autocast", [False, True])
def test_a_subclass_that_computes_the_same_is_its_base(bias: bool, autocast: bool) -> None:
    same, plain = Same(4, 3, bias=bias), nn.Linear(4, 3, bias=bias)
    plain.load_state_dict(same.state_dict())
    kappas = []
    for layer in (same, plain):
        with observe(layer) as observed, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = loss_of(layer)
        kappa = relative_flatness(loss, observed)
        kappas.append((kappa, *torch.autograd.grad(kappa, list(layer.parameters())[:1])))
    for a, b in zip(*kappas, strict=True):
        assert torch.equal(a, b)


def test_a_convolution_that_computes_the_same_against_the_definition(float64: None) -> None:
    layer = SameConvolution(2, 3, 2)
    with observe(layer) as observed:
        loss = loss_of(layer)
    hessian = reference.brute_force_hessian(loss, layer.weight)
    d, m = 3, 8
    wanted = reference.kappa(layer.weight.flatten(1), hessian.reshape(d, m, d, m), "neuronwise")
    torch.testing.assert_close(relative_flatness(loss, observed), wanted, rtol=1e-9, atol=0)


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "other weight": (lambda: Rounded(4, 3), r"Rounded.*overrides Linear.forward.*hutchinson"),
    "other graph": (lambda: on_the_grid(StraightThrough(4, 3)), "StraightThrough.*overrides Linear.forward"),
    "other numbers": (lambda: BehindTheGraph(4, 3), "BehindTheGraph.*overrides Linear.forward"),
    "random": (lambda: Dropped(4, 3), "Dropped.*overrides Linear.forward"),
    "other convolution": (lambda: Standardised(2, 3, 2), "Standardised.*overrides Conv2d._conv_forward"),
    "quantisation-aware Linear": (
        quantisation_aware,
        r"torch.ao.nn.qat.*overrides Linear.forward.*quantisation-aware.*mode='hutchinson'",
    ),
    "quantisation-aware convolution": (
        quantisation_aware_convolution,
        r"ConvReLU2d.*overrides Conv2d.forward.*mode='hutchinson'",
    ),
}


def on_the_grid(layer: nn.Linear) -> nn.Linear:
    with torch.no_grad():
        layer.weight.copy_(torch.arange(layer.weight.numel()).reshape(layer.weight.shape) - 5)
    return layer


@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED)
def test_a_subclass_that_computes_something_else_is_refused_at_its_first_call(
    make: Callable[[], nn.Module], message: str
) -> None:
    layer = make()
    fam = FAM(layer.parameters(), torch.optim.SGD, layer, 0.1, lr=0.1)
    before = [p.detach().clone() for p in layer.parameters()]
    with pytest.raises(TypeError, match=message):
        fam.step(lambda: loss_of(layer))
    assert all(torch.equal(p, b) for p, b in zip(layer.parameters(), before, strict=True))


def test_a_subclass_that_begins_to_compute_something_else_is_refused() -> None:
    class Turning(Same):
        scale = 1.0

        def forward(self, input: Tensor) -> Tensor:
            z = super().forward(input)
            return z if self.scale == 1 else z * self.scale

    layer = Turning(4, 3)
    fam = FAM(layer.parameters(), torch.optim.SGD, layer, 0.1, lr=0.1)
    fam.step(lambda: loss_of(layer))
    layer.scale = 2.0
    with pytest.raises(TypeError, match="computes something else"):
        fam.step(lambda: loss_of(layer))


def test_weight_of_a_quantisation_aware_layer_is_measured() -> None:
    """As the message says: the parameter, with random probes."""
    layer: Any = quantisation_aware()
    net = nn.Sequential(layer, nn.Tanh(), nn.Linear(3, 3))
    fam = FAM(net.parameters(), torch.optim.SGD, layer.weight, 0.1, "hutchinson", lr=0.1)
    before = layer.weight.detach().clone()
    fam.step(lambda: F.cross_entropy(net(torch.randn(5, 4)), torch.tensor([0, 1, 2, 0, 1])))
    assert fam.last_kappa is not None and fam.last_kappa.isfinite() and fam.last_kappa != 0
    assert not torch.equal(layer.weight, before)


def test_a_complex_layer_of_a_subclass_is_refused() -> None:
    """It computes what its base does, and has no kappa all the same."""
    layer = Same(4, 3, dtype=torch.complex128)
    with observe(layer) as observed:
        loss = layer(torch.ones(5, 4, dtype=torch.complex128)).abs().square().mean()
    with pytest.raises(TypeError, match=r"a real weight.*torch\.complex128"):
        relative_flatness(loss, observed)
