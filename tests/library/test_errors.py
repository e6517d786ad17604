"""Errors and warnings: each at the earliest moment, saying what was expected, what came, what to do."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fam_optim import FAM, dataset_relative_flatness, observe, relative_flatness
from fam_optim.estimators import exact as exact_module


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def data() -> tuple[Tensor, Tensor]:
    return torch.randn(6, 4), torch.tensor([0, 1, 2, 0, 1, 2])


def build(model: nn.Sequential, **changes: Any) -> FAM:
    arguments: dict[str, Any] = {"base_optimizer": torch.optim.SGD, "layer": model[2], "lr": 0.1, **changes}
    return FAM(model.parameters(), **arguments)


CONSTRUCTION: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "unknown mode": ({"mode": "fast"}, ValueError, r"`mode`.*'exact', 'full', 'hutchinson'.*'fast'"),
    "unknown measure": ({"measure": "trace"}, ValueError, r"`measure`.*'layerwise', 'neuronwise'.*'trace'"),
    "negative lam": ({"lam": -1.0}, ValueError, r"`lam`.*at least 0, got -1.0"),
    "NaN lam": ({"lam": float("nan")}, ValueError, r"`lam`.*finite.*nan"),
    "infinite lam": ({"lam": float("inf")}, ValueError, r"`lam`.*finite.*inf"),
    "no probes": ({"n_samples": 0}, ValueError, r"`n_samples`.*positive integer, got 0"),
    "generator": ({"generator": 3}, TypeError, r"`generator`.*torch.Generator, got int"),
    "activation": ({"layer": nn.ReLU()}, TypeError, r"`layer`.*nn.Linear.*ReLU\(\).*hutchinson"),
    "normalisation": ({"layer": nn.LayerNorm(3)}, TypeError, r"`layer`.*LayerNorm.*weight matrix"),
    "embedding": ({"layer": nn.Embedding(3, 2)}, TypeError, r"`layer`.*Embedding\(3, 2\)"),
    "container": ({"layer": net()}, TypeError, r"`layer`.*Sequential"),
    "bias": (
        {"layer": nn.Parameter(torch.zeros(3)), "mode": "full"},
        TypeError,
        r"weight matrix.*shape \(3,\).*not its bias",
    ),
    "exact parameter": (
        {"layer": nn.Parameter(torch.zeros(3, 2))},
        ValueError,
        r"mode='exact'.*shape \(3, 2\).*hutchinson",
    ),
    "name of a layer": ({"layer": "head"}, TypeError, r"`layer`.*nn.Module.*str.*'head'"),
    "no layer": ({"layer": []}, ValueError, r"`layer`.*at least one layer"),
    "base instance": (
        {"base_optimizer": torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)},
        TypeError,
        r"`base_optimizer`.*class or callable.*instance of SGD.*FAM\(params, SGD",
    ),
    "base not callable": ({"base_optimizer": "sgd"}, TypeError, r"`base_optimizer`.*callable.*'sgd'"),
    "base makes none": (
        {"base_optimizer": lambda p, lr: 3},
        TypeError,
        r"`base_optimizer`.*Optimizer, got a int",
    ),
}


@pytest.mark.parametrize(("changes", "error", "message"), CONSTRUCTION.values(), ids=CONSTRUCTION)
def test_construction(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    model = net()
    with pytest.raises(error, match=f"(?s){message}"):
        build(model, **changes)
    assert not model[2]._forward_hooks


def test_same_layer_twice() -> None:
    model = net()
    with pytest.raises(ValueError, match="the same one twice"):
        build(model, layer=[model[2], model[2]])


def test_lam_is_checked_when_set() -> None:
    optimizer = build(net())
    with pytest.raises(ValueError, match=r"`lam`.*got -0.1"):
        optimizer.lam = -0.1
    assert optimizer.lam == 8e-3


@pytest.mark.parametrize("of", [lambda m: m[2], lambda m: m[2].weight], ids=["module", "parameter"])
def test_untrained_layer_warns(of: Callable[[nn.Sequential], Any]) -> None:
    model = net()
    with pytest.warns(UserWarning, match=r"not among the parameters given to FAM.*Add them to `params`"):
        FAM(model[0].parameters(), torch.optim.SGD, of(model), mode="hutchinson", lr=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build(model)
        model[0].requires_grad_(False)
        FAM.for_model(model, torch.optim.SGD, params=model[2].parameters(), lr=0.1)


def test_frozen_layer_and_body_are_measured() -> None:
    model = net().double()
    x, y = data()
    for module in model[:1]:
        module.requires_grad_(False)
    with observe(model[0]) as layer:
        loss = F.cross_entropy(model(x.double()), y)
    frozen = relative_flatness(loss, layer)
    frozen.backward()
    gradient = model[2].weight.grad
    model[0].requires_grad_(True)
    with observe(model[0]) as layer:
        loss = F.cross_entropy(model(x.double()), y)
    free = relative_flatness(loss, layer)
    torch.testing.assert_close(frozen, free, rtol=1e-12, atol=0)
    torch.testing.assert_close(
        gradient, torch.autograd.grad(free, model[2].weight)[0], rtol=1e-10, atol=1e-14
    )


def run(model: nn.Module, layer: Any, loss_fn: Callable[[Tensor, Tensor], Tensor], **settings: Any) -> Tensor:
    x, y = data()
    with observe(layer) as observed:
        loss = loss_fn(model(x), y)
    return relative_flatness(loss, observed, **settings)


def test_loss_not_a_scalar() -> None:
    model = net()
    with pytest.raises(ValueError, match=r"`loss` to be a scalar, got shape \(6,\).*\.mean\(\)"):
        run(model, model[2], lambda z, y: F.cross_entropy(z, y, reduction="none"))


def test_loss_without_a_graph() -> None:
    model = net()
    with pytest.raises(RuntimeError, match=r"`loss` to depend on the layer.*no_grad"):
        run(model, model[2], lambda z, y: F.cross_entropy(z, y).detach())


def test_loss_that_is_no_tensor() -> None:
    model = net()
    with pytest.raises(TypeError, match=r"`loss` to be a scalar tensor, got float"):
        run(model, model[2], lambda z, y: 0.5)  # type: ignore[arg-type, return-value]


@pytest.mark.parametrize("mode", ["exact", "full", "hutchinson"])
def test_layer_not_used_by_the_loss(mode: str) -> None:
    model, other = net(), nn.Linear(4, 3)
    with pytest.raises(
        RuntimeError, match=r"does not depend on an observed call of `layer` Linear\(in_features=4"
    ):
        run(model, other, F.cross_entropy, mode=mode)
    if mode != "exact":
        loss = F.cross_entropy(model(data()[0]), data()[1])
        with pytest.raises(RuntimeError, match=r"does not depend on `layer`, a Parameter of shape \(3, 4\)"):
            relative_flatness(loss, other.weight, mode=mode)


def test_module_instead_of_observation() -> None:
    model = net()
    loss = F.cross_entropy(model(data()[0]), data()[1])
    with pytest.raises(TypeError, match=r"got the module Linear.*with observe\(module\) as layer"):
        relative_flatness(loss, model[2])  # type: ignore[arg-type]


def test_exact_parameter_in_the_function() -> None:
    model = net()
    loss = F.cross_entropy(model(data()[0]), data()[1])
    with pytest.raises(ValueError, match=r"mode='exact'.*hutchinson"):
        relative_flatness(loss, model[2].weight)


@pytest.mark.parametrize("mode", ["exact", "full", "hutchinson"])
def test_loss_linear_in_the_layer_has_kappa_zero(mode: str) -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    kappa = run(model, model[2], lambda z, y: z.sum(), mode=mode)
    assert kappa.item() == 0
    optimizer = build(model, mode=mode)
    x, _ = data()
    expected = torch.autograd.grad(model(x).sum(), model[0].weight)[0]
    optimizer.regularize(model(x).sum()).backward()
    torch.testing.assert_close(model[0].weight.grad, expected, rtol=0, atol=0)


def test_too_many_products_names_the_number_and_the_remedy() -> None:
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 36, 3))
    with observe(model[0]) as layer:
        loss = F.cross_entropy(model(torch.randn(2, 3, 8, 8)), torch.tensor([0, 1]))
    with pytest.raises(
        RuntimeError, match=r"16 x 27.*432 Hessian-vector products.*limit of 100\b.*hutchinson"
    ):
        _with_limit(100, lambda: relative_flatness(loss, layer))
    assert torch.isfinite(relative_flatness(loss, layer, mode="hutchinson"))


def _with_limit(limit: int, call: Callable[[], Any]) -> Any:
    before = exact_module.MAX_PRODUCTS
    exact_module.MAX_PRODUCTS = limit
    try:
        return call()
    finally:
        exact_module.MAX_PRODUCTS = before


def test_batch_norm_behind_the_layer() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3))
    kappa = run(model, model[0], F.cross_entropy)
    assert torch.isfinite(kappa)
    with pytest.raises(RuntimeError, match=r"BatchNorm in train mode.*detach_hessian"):
        kappa.backward()
    x, y = data()
    whole = build(model, layer=model[0])
    before = model[0].weight.detach().clone()
    with pytest.raises(RuntimeError, match="detach_hessian"):
        whole.step(lambda: F.cross_entropy(model(x), y))
    assert torch.equal(model[0].weight, before)
    detached = build(model, layer=model[0], detach_hessian=True)
    detached.step(lambda: F.cross_entropy(model(x), y))
    assert not torch.equal(model[0].weight, before)


def test_step_with_nothing_regularized() -> None:
    model = net()
    optimizer = build(model)
    x, y = data()
    F.cross_entropy(model(x), y).backward()
    with pytest.raises(RuntimeError, match=r"regularize\(\) was not called.*optimizer.step\(lambda"):
        optimizer.step()
    optimizer.zero_grad()
    optimizer.regularize(F.cross_entropy(model(x), y)).backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match=r"regularize\(\) was not called since the last step"):
        optimizer.step()


def test_closure_that_trains_something_else() -> None:
    model, other = net(), net()
    optimizer = build(model)
    x, y = data()
    before = model[2].weight.detach().clone()
    with pytest.raises(RuntimeError, match=r"no loss that was backpropagated.*Linear\(in_features=5"):
        optimizer.step(lambda: F.cross_entropy(other(x), y).backward())
    assert torch.equal(model[2].weight, before)


@pytest.mark.parametrize("result", [None, 0.5, {"loss": 1}], ids=repr)
def test_closure_that_returns_no_loss(result: Any) -> None:
    optimizer = build(net())
    with pytest.raises(RuntimeError, match="expected the closure to return the loss"):
        optimizer.step(lambda: result)


def test_backpropagated_already() -> None:
    model = net()
    x, y = data()
    with observe(model[0]) as layer:
        loss = F.cross_entropy(model(x), y)
    loss.backward()
    with pytest.raises(RuntimeError, match=r"backpropagated already.*before its backward\(\)"):
        relative_flatness(loss, layer)


def test_input_modified_in_place_behind_our_back() -> None:
    layer = nn.Linear(4, 4).requires_grad_(False)
    x, y = data()
    with observe(layer) as observed:
        phi = x.clone()
        z = layer(phi)
        phi.mul_(2)
        loss = F.cross_entropy(z, y)
    with pytest.raises(RuntimeError, match=r"Linear.*modified in place"):
        relative_flatness(loss, observed)


def test_fused_attention_names_the_math_back_end() -> None:
    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.project = nn.Linear(4, 8)

        def forward(self, x: Tensor) -> Tensor:
            q = self.project(x)[None, None]
            return F.scaled_dot_product_attention(q, q, q)[0, 0]

    model = Attends()
    with pytest.raises(RuntimeError, match=r"sdpa_kernel\(SDPBackend.MATH\)"):
        run(model, model.project, F.cross_entropy)


def test_empty_loader() -> None:
    model = net()
    with pytest.raises(ValueError, match="`loader` to yield at least one batch"):
        dataset_relative_flatness(model, model[2], F.cross_entropy, [])
    assert model.training
