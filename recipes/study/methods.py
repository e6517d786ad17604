"""Defines the methods that the study compares. Most have one value of their own, which is searched.

Noise on the inputs of a layer is a finite sample of FAM's penalty. With eps standard normal and
``phi' = phi + sigma ||phi|| eps`` at one row phi for each sample,

    E L(phi') = L + sigma^2 / 2 ||phi||^2 Tr(Hess_phi L) + ... = L + sigma^2 / 2 kappa + ...

So the value of the noise is the lam of the penalty that it samples, ``sigma = sqrt(2 lam)``. A convolution
shares its weight among positions; there ``W' = W + sigma W Z``, with Z ``(m, m)`` standard normal, has the
same second order: ``E <WZ, H WZ> = <W W^T, T>``.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, dropout
from torch.optim import Optimizer

from fam_optim import weight_layers
from recipes.engine.layers import select
from recipes.engine.optimizers import BASES, GAUSS_NEWTON, Settings, build
from recipes.study.ablations import FORMS, with_form


@dataclass(frozen=True)
class Method:
    """A way to train, without the value of its hyper-parameter."""

    values: tuple[float, ...]  # all that may be tried, from ``start`` on one step at a time
    start: tuple[float, ...]  # the values tried first
    kind: str  # says what takes the value
    layers: str = ""  # the regularised layers, by a name of `recipes.engine.layers`
    options: Mapping[str, Any] = field(default_factory=dict)  # fixed options of the optimizer


def powers(lowest: int, highest: int) -> tuple[float, ...]:
    """Returns 1 and 3 times the powers of ten."""
    return tuple(float(f"{m}e{e}") for e in range(lowest, highest + 1) for m in (1, 3))


def fam(layers: str, *start: float, **options: Any) -> Method:
    """Returns FAM with Gauss-Newton curvature from one random vector; on the last layer in closed form."""
    if layers != "last":
        options = {**GAUSS_NEWTON, **options}
    return Method(powers(-8, 1), start or (1e-3, 3e-3, 1e-2), "fam", layers, options)


DETACHED = {"detach_hessian": True}
LEARNING_RATES = (0.0008, 0.0015, 0.003, 0.006, 0.0125, 0.025, 0.05, 0.1, 0.2, 0.4, 0.8)
WEIGHT_DECAYS = (0.0, 1e-4, 5e-4, 2e-3, 8e-3, 3e-2, 0.1, 0.3)
RHO = ((0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2), (0.05, 0.1, 0.2))
RHO_ADAPTIVE = ((0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 4, 8, 16), (0.5, 1, 2))

COMPARED: dict[str, Method] = {  # methods with a search
    "SGD": Method((), (), "sgd"),
    "SGD, no weight decay": Method((), (), "sgd"),
    "label smoothing": Method((0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 0.9), (0.1, 0.2, 0.4), "smoothing"),
    "dropout": Method((0.01, 0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8), (0.1, 0.2, 0.35), "dropout"),
    "noise, hidden layers": Method(powers(-6, 0), (1e-3, 3e-3, 1e-2), "noise", "hidden"),
    "SAM": Method(*RHO, "sam"),
    "ASAM": Method(*RHO_ADAPTIVE, "sam", options={"adaptive": True}),
    "LookSAM, k = 5": Method(*RHO, "looksam", options={"k": 5}),
    "FAM, last layer, detached": fam("last", **DETACHED),
    "FAM, hidden": fam("hidden"),
    "FAM, hidden, detached": fam("hidden", **DETACHED),
    "FAM, proximal": Method((0.1, 0.2, 0.3, 0.5, 1, 2, 4), (0.5, 1, 2), "proximal", "hidden"),
}
OTHERS: dict[str, Method] = {  # methods without a search
    "base": Method((), (), "sgd"),
    "LookSAM, k = 10": Method(*RHO, "looksam", options={"k": 10}),
    "FAM, last layer": fam("last"),
    "control, T = I": Method((0.1, 0.3, 1.0), (0.3,), "control", "hidden"),
}
OTHER_FORMS: dict[str, Method] = {  # forms of the proximal step
    name: Method((form.lam,), (form.lam,), "form", form.layers, {"form": form})
    for name, form in FORMS.items()
}
METHODS = {**COMPARED, **OTHERS, **OTHER_FORMS}


# kind -> the optimizer around the base, and its option that takes the method's value
WRAPPED = {"sam": ("sam", "rho"), "looksam": ("looksam", "rho")}
WRAPPED |= dict.fromkeys(("fam", "proximal", "form"), ("fam", "lam"))


def make_optimizer(
    method: Method, value: float, model: nn.Module, base: str, seed: int, every: int = 10, **settings: float
) -> Optimizer:
    """Returns the method's optimizer of the model's parameters; ``settings`` are the base's."""
    chosen: Settings = {"optimizer": base, "base": base, **BASES[base], **settings}
    if method.kind in WRAPPED:
        name, takes = WRAPPED[method.kind]
        chosen |= {"optimizer": name, takes: value, **method.options}
    if method.kind in ("proximal", "form"):
        chosen |= {"mode": "proximal", "every": every}
    form = chosen.pop("form", None)
    layers = select(model, [method.layers or "hidden"])
    optimizer = build(chosen, model, layers, torch.Generator().manual_seed(seed))
    if form:
        with_form(optimizer, form, layers, every, seed)
    if method.kind == "control":
        add_control(optimizer, [nn.Module.get_parameter(layer, "weight") for layer in layers], value, every)
    return optimizer


def add_control(optimizer: Optimizer, weights: Sequence[Tensor], lam: float, every: int) -> None:
    """Adds the proximal step with T = I, which is weight decay by the trust ratio, after every so many steps.

    ``W <- W / (1 + 2 c)`` with ``c = lam every ||W - W'|| / ||2 W||``, where W' is W before that step.
    """
    steps = itertools.count(1)
    before: list[Tensor] = []

    def keep(*_: Any) -> None:
        before[:] = [w.detach().clone() for w in weights] if next(steps) % every == 0 else []

    @torch.no_grad()
    def pull(*_: Any) -> None:
        for w, old in zip(weights, before, strict=bool(before)):
            c = lam * every * (w - old).norm() / (2 * w.norm()).clamp_min(torch.finfo(w.dtype).tiny)
            w.div_(1 + 2 * c)

    optimizer.register_step_pre_hook(keep)
    optimizer.register_step_post_hook(pull)


def add_hooks(method: Method, value: float, model: nn.Module) -> None:
    """Adds what the method does inside the network, in train mode."""
    if method.kind == "noise":
        for layer in select(model, [method.layers]):
            add_noise(layer, (2 * value) ** 0.5)
    if method.kind == "dropout":  # on the input of each Linear layer but the first
        for layer in weight_layers(model)[1:]:
            if isinstance(layer, nn.Linear):
                layer.register_forward_pre_hook(lambda own, x: dropout(x[0], value, own.training))


def add_noise(layer: nn.Module, sigma: float) -> None:
    """Adds relative Gaussian noise to a Linear layer's input or a convolution's weight, in train mode."""

    def on_rows(own: nn.Module, arguments: tuple[Tensor]) -> Tensor:
        (x,) = arguments
        return x + sigma * x.norm(dim=-1, keepdim=True) * torch.randn_like(x) if own.training else x

    def on_patches(own: nn.Module, arguments: tuple[Tensor], output: Tensor) -> Tensor:
        if not own.training:
            return output
        assert isinstance(own, nn.Conv2d)
        w = own.weight.flatten(1)
        moved = (w @ torch.randn(w.shape[1], w.shape[1], dtype=w.dtype)).view_as(own.weight)
        added = conv2d(arguments[0], moved, None, own.stride, own.padding, own.dilation, own.groups)
        return output + sigma * added

    if isinstance(layer, nn.Linear):
        layer.register_forward_pre_hook(on_rows)
    else:
        layer.register_forward_hook(on_patches)
