"""What is compared. Every method has one hyper-parameter and a grid of the same size for it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from recipes.study.penalties import Loss, partly_constant, share_of_gradient, share_of_loss


@dataclass(frozen=True)
class Method:
    """A way to train, but for the value of its hyper-parameter.

    Attributes:
        grid: the values that it is tuned over.
        beyond: one more on either side, tried where the grid's first or last is the best.
        option: the optimizer's option that takes the value, or None if the loss does.
        optimizer: a name of `recipes.engine.optimizers`.
        options: fixed ones.
        loss: ``(value, head, phi, logits, targets) -> ()``.
        epochs: how many, as a part of the plain optimizer's.
        averaged: whether an exponential moving average of the weights, the value its decay, is evaluated.
        warm_up: part of the steps over which lam grows linearly from 0.
    """

    grid: tuple[float, ...]
    beyond: tuple[float, ...] = ()
    option: str | None = None
    optimizer: str | None = None  # the plain one
    options: Mapping[str, Any] = field(default_factory=dict)
    loss: Loss | None = None
    epochs: float = 1
    averaged: bool = False
    warm_up: float = 0


def label_smoothing(value: float, head: nn.Linear, phi: Tensor, logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy against smoothed labels."""
    return cross_entropy(logits, targets, label_smoothing=value)


def head_norm(value: float, head: nn.Linear, phi: Tensor, logits: Tensor, targets: Tensor) -> Tensor:
    """Extra L2 on the last layer's weight."""
    return cross_entropy(logits, targets) + value * head.weight.square().sum()


def head_and_feature_norm(
    value: float, head: nn.Linear, phi: Tensor, logits: Tensor, targets: Tensor
) -> Tensor:
    """Extra L2 on the last layer's weight and input, the control of Baek et al. (ICLR 2024)."""
    norms = head.weight.square().sum() + phi.square().sum(1).mean()
    return cross_entropy(logits, targets) + value * norms


def fam(*values: float, warm_up: float = 0, **options: Any) -> Method:
    """FAM with lam from a grid; the first and last value lie beyond it."""
    return Method(values[1:-1], values[:1] + values[-1:], "lam", "fam", options, warm_up=warm_up)


RHO = ((0.02, 0.05, 0.1, 0.2, 0.4), (0.01, 0.8), "rho")
RHO_ADAPTIVE = ((0.2, 0.5, 1, 2, 4), (0.1, 8), "rho")
DETACHED = {"detach_hessian": True}

CANDIDATES: dict[str, Method] = {
    "plain": Method((0.0125, 0.025, 0.05, 0.1, 0.2), (0.006, 0.4), "lr"),
    "weight decay": Method((1e-4, 1e-3, 3e-3, 1e-2, 3e-2), (0.0, 1e-1), "weight_decay"),
    "label smoothing": Method((0.05, 0.1, 0.2, 0.4, 0.6), (0.02, 0.8), loss=label_smoothing),
    "head L2": Method((1e-3, 3e-3, 1e-2, 3e-2, 1e-1), (3e-4, 0.3), loss=head_norm),
    "head and feature L2": Method((1e-4, 3e-4, 1e-3, 3e-3, 1e-2), (3e-5, 3e-2), loss=head_and_feature_norm),
    "EMA": Method((0.9, 0.97, 0.99, 0.995, 0.998), (0.8, 0.999), averaged=True),
    "sam": Method(*RHO, "sam"),
    "sam, half the epochs": Method(*RHO, "sam", epochs=0.5),
    "asam": Method(*RHO_ADAPTIVE, "asam"),
    "asam, half the epochs": Method(*RHO_ADAPTIVE, "asam", epochs=0.5),
    "fam": fam(3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1),
    "fam detached": fam(1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, **DETACHED),
    "fam layerwise": fam(3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, measure="layerwise"),
    "fam layerwise detached": fam(1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, measure="layerwise", **DETACHED),
}
PARTS: dict[str, Method] = {  # which part of the whole gradient does the harm
    "fam, p constant": Method(CANDIDATES["fam"].grid, loss=partly_constant("p")),
    "fam, phi constant": Method(CANDIDATES["fam detached"].grid, loss=partly_constant("phi")),
}
LAMBDAS = (0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.128)
WEIGHTINGS: dict[str, Method] = {  # ways to weigh kappa, with a detached Hessian but for the last
    "fixed": Method(LAMBDAS, (), "lam", "fam", DETACHED),
    "fixed, warm-up": Method(LAMBDAS[5:], (), "lam", "fam", DETACHED, warm_up=0.2),
    "share of gradient": Method((0.1, 0.2, 0.3, 0.5), loss=share_of_gradient),
    "share of loss": Method((0.02, 0.05, 0.1), loss=share_of_loss),
    "fixed, whole gradient": Method((0.001, 0.004, 0.016, 0.064), (), "lam", "fam"),
}
METHODS = {**CANDIDATES, **PARTS, **WEIGHTINGS}
