"""Calls that are not plain: with other weights (functional_call, MAML), under torch.func, by keyword."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import stateless

from fam_optim import observe, relative_flatness
from tests import reference
from tests.sandwich import COMPUTED, MODES, WHERE, Sandwich, check, data, fam_on, loss_of, two_calls
from tests.support import recorded_calls, seeded, warnings_as

pytestmark = pytest.mark.usefixtures("float64")


def substituted(call: Callable[..., Tensor]) -> Callable[[nn.Module], Tensor]:
    """The model called with other parameters, which depend on its own."""

    def run(model: nn.Module) -> Tensor:
        x, y = data()
        others = {name: p.tanh() + 0.1 for name, p in model.named_parameters()}
        return F.cross_entropy(call(model, others, (x,)), y)

    return run


FUNCTIONAL = {"torch.func": torch.func.functional_call, "stateless": stateless.functional_call}


@MODES
@WHERE
@pytest.mark.parametrize("call", FUNCTIONAL.values(), ids=FUNCTIONAL)
def test_functional_call_counts_the_weight_that_it_substitutes(
    call: Callable[..., Tensor], head: bool, mode: str
) -> None:
    with warnings_as("ignore"):  # stateless is deprecated
        check(partial(Sandwich, head), substituted(call), mode=mode)


def adapted(model: nn.Module) -> dict[str, Tensor]:
    """The parameters after one differentiable inner step, as MAML makes it."""
    x, y = data()
    weights = dict(model.named_parameters())
    inner = F.cross_entropy(torch.func.functional_call(model, weights, (x,)), y)
    gradients = torch.autograd.grad(inner, list(weights.values()), create_graph=True)
    return {name: w - 0.5 * g for (name, w), g in zip(weights.items(), gradients, strict=True)}


@MODES
def test_kappa_at_adapted_weights(mode: str) -> None:
    """Observed around the outer call alone: kappa at the adapted weights, differentiated through the step."""
    model = seeded(Sandwich)
    parameters = list(model.parameters())
    x, y = data()
    weights = adapted(model)

    def outer() -> Tensor:
        return F.cross_entropy(torch.func.functional_call(model, weights, (x + 0.3,)), y)

    with observe(model.layer) as layer:
        kappa = relative_flatness(outer(), layer, mode=mode)
    curvatures = reference.curvatures(outer, [model.layer], create_graph=True)
    wanted = reference.sum_of_kappas(curvatures, "neuronwise")
    torch.testing.assert_close(kappa, wanted, rtol=1e-9, atol=0)
    for got, g in zip(
        reference.gradient(kappa, parameters), reference.gradient(wanted, parameters), strict=True
    ):
        torch.testing.assert_close(got, g, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("mode", ["exact", "full", "hutchinson"])
def test_calls_with_different_weights_are_refused(mode: str) -> None:
    message = r"different weights.*spectral_norm.*concatenated inputs.*parametrize.cached"
    model = seeded(partial(Sandwich, make=COMPUTED["spectral_norm"]))
    with pytest.raises(RuntimeError, match=message):
        fam_on(model, mode).step(lambda: two_calls(model))
    plain = seeded(Sandwich)
    x, y = data()

    def interpolated() -> Tensor:
        other = {name: 0.9 * p for name, p in plain.named_parameters()}
        return F.cross_entropy(plain(x) + torch.func.functional_call(plain, other, (x,)), y)

    fam = fam_on(plain, mode)
    with pytest.raises(RuntimeError, match=message):
        fam.step(interpolated)
    with pytest.raises(RuntimeError, match=r"derivative.*taken through `layer`"):  # MAML, inner call and all
        fam.step(lambda: F.cross_entropy(torch.func.functional_call(plain, adapted(plain), (x,)), y))


TRANSFORMS: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], Any]] = {
    "vmap": lambda f, x: torch.func.vmap(f)(x),
    "per-sample gradients": lambda f, x: torch.func.vmap(torch.func.grad(lambda a: f(a).sum()))(x),
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (x.cos(),))[1],
    "jacfwd": lambda f, x: torch.func.jacfwd(f)(x[0]),
    "jacrev": lambda f, x: torch.func.jacrev(f)(x[0]),
    "hessian": lambda f, x: torch.func.hessian(lambda a: f(a).sum())(x[0]),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning")  # torch's own
@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_function_transforms_work_on_an_observed_model(transform: Callable[..., Any], frozen: bool) -> None:
    model = seeded(Sandwich)
    model.body[3] = nn.ReLU()
    model.requires_grad_(not frozen)
    x, _ = data()
    plain = transform(model, x)
    with observe(model.layer):
        assert torch.equal(transform(model, x), plain)
    assert not recorded_calls(model.layer)


def test_loss_through_vmap_is_refused() -> None:
    model = seeded(Sandwich)
    model.body[3] = nn.ReLU()
    fam, (x, y) = fam_on(model), data()
    with pytest.raises(RuntimeError, match=r"does not depend on an observed call of `layer` Linear"):
        fam.step(lambda: F.cross_entropy(torch.func.vmap(model)(x), y))


def test_layer_called_with_a_keyword() -> None:
    def run(model: nn.Module) -> Tensor:
        x, y = data()
        return F.cross_entropy(model.tail(model.layer(input=model.body(x))), y)

    check(Sandwich, run, loss_of)
