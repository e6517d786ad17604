"""One step of FAM on a layer between others, in whatever situation, against the step of the definition.

`check` takes the step on a model as the situation has it, and the definition's (`tests.reference`, by
nested loops) on a model that is built the same way but may run plainly.
"""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.checkpoint import checkpoint

from fam_optim import FAM
from tests import reference
from tests.cases import LowRankUpdate
from tests.support import LAM, LR, samples, seeded, warnings_as

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.support import Batch

TOLERANCE = 1e-10
MODES = pytest.mark.parametrize("mode", ["exact", "full"])
WHERE = pytest.mark.parametrize("head", [False, True], ids=["middle", "head"])


class Sandwich(nn.Module):
    """body -> layer -> tail. The regularised layer is in the middle or, with `head`, the last one."""

    def __init__(self, head: bool = False, make: Callable[[int, int], nn.Module] = nn.Linear) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 6), nn.ReLU(inplace=True))
        self.layer = make(6, 3 if head else 4)
        self.tail = nn.Identity() if head else nn.Sequential(nn.GELU(), nn.Linear(4, 3), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        return self.tail(self.layer(self.body(x)))


def data() -> Batch:
    """The batch of every test."""
    return samples(1, 6)


def loss_of(model: nn.Module) -> Tensor:
    """The plain way to the loss."""
    x, y = data()
    return F.cross_entropy(model(x), y)


def two_calls(model: nn.Module, cache: bool = False) -> Tensor:
    x, y = data()
    with parametrize.cached() if cache else nullcontext():
        return F.cross_entropy(
            model.tail(model.layer(model.body(x)) + model.layer(x.sin().repeat(1, 2)[:, :6])), y
        )


def checkpointed(part: str, reentrant: bool) -> Callable[[nn.Module], Tensor]:
    """The loss, with one part of the way to it under an activation checkpoint."""
    x, y = data()
    x.requires_grad_()  # what a reentrant checkpoint must get
    save = partial(checkpoint, use_reentrant=reentrant)

    def run(model: nn.Module) -> Tensor:
        if part == "body":
            return F.cross_entropy(model.tail(model.layer(save(model.body, x))), y)
        if part == "layer":
            return F.cross_entropy(model.tail(save(model.layer, model.body(x))), y)
        if part == "tail":
            return F.cross_entropy(save(model.tail, model.layer(model.body(x))), y)
        if part == "loss":
            return save(lambda z: F.cross_entropy(model.tail(z), y), model.layer(model.body(x)))
        return save(lambda x: F.cross_entropy(model(x), y), x)

    return run


def fam_on(model: nn.Module, mode: str = "exact", **kwargs: Any) -> FAM:
    """FAM on model.layer; a warning is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return FAM(model.parameters(), torch.optim.SGD, model.layer, LAM, mode, lr=LR, **kwargs)


def definition(
    build: Callable[[], nn.Module], run: Callable[[nn.Module], Tensor], path: str = "layer"
) -> tuple[Tensor, dict[str, Tensor]]:
    """kappa by the definition, and every parameter after one SGD step on loss + lam * kappa."""
    model, twin = seeded(build), seeded(build)  # one forward each: some layers change with every forward
    curvatures = reference.curvatures(lambda: run(twin), [twin.get_submodule(path)], create_graph=True)
    kappa = reference.sum_of_kappas(curvatures, "neuronwise")
    weights = dict(model.named_parameters())
    trained = [name for name, p in weights.items() if p.requires_grad]
    by_loss = reference.gradient(run(model), [weights[name] for name in trained])
    by_kappa = reference.gradient(kappa, [dict(twin.named_parameters())[name] for name in trained])
    moved = {name: p.detach().clone() for name, p in weights.items()}
    for name, g, h in zip(trained, by_loss, by_kappa, strict=True):
        moved[name] -= LR * (g + LAM * h)
    return kappa.detach(), moved


def assert_step(model: nn.Module, fam: FAM, kappa: Tensor, moved: dict[str, Tensor]) -> None:
    assert fam.last_kappa is not None
    error = ((fam.last_kappa - kappa) / kappa).abs()
    assert error <= TOLERANCE, f"kappa is {fam.last_kappa:.12g}, expected {kappa:.12g}"
    assert kappa.abs() > 1e-4, "a case with nothing to regularise proves nothing"
    for name, p in model.named_parameters():
        error = (p.detach() - moved[name]).norm() / moved[name].norm().clamp_min(1e-300)
        assert error <= TOLERANCE, f"{name} after the step: relative error {error:.1e}"


def check(
    build: Callable[[], nn.Module],
    run: Callable[[nn.Module], Tensor] = loss_of,
    plain: Callable[[nn.Module], Tensor] | None = None,
    mode: str = "exact",
) -> nn.Module:
    """One step with `run` is the step by the definition with `plain`."""
    kappa, moved = definition(build, plain or run)
    model = seeded(build)
    fam = fam_on(model, mode)
    fam.step(lambda: run(model))
    assert_step(model, fam, kappa, moved)
    return model


# ----------------------------------------------------------------------------------- computed weights


def old_weight_norm(m: int, d: int) -> nn.Module:
    with warnings_as("ignore"):  # deprecated, and still everywhere
        return nn.utils.weight_norm(nn.Linear(m, d))


def pruned(m: int, d: int) -> nn.Module:
    return prune.l1_unstructured(nn.Linear(m, d), "weight", 0.5)


def pruned_twice(m: int, d: int) -> nn.Module:
    return prune.random_structured(pruned(m, d), "weight", 0.3, dim=0)


def lora(m: int, d: int) -> nn.Module:
    layer = nn.Linear(m, d)
    layer.weight.requires_grad_(False)
    return parametrize.register_parametrization(layer, "weight", LowRankUpdate(d, m))


def lora_on_weight_norm(m: int, d: int) -> nn.Module:
    layer = parametrizations.weight_norm(nn.Linear(m, d))
    return parametrize.register_parametrization(layer, "weight", LowRankUpdate(d, m))


COMPUTED: dict[str, Callable[[int, int], nn.Module]] = {
    "weight_norm": lambda m, d: parametrizations.weight_norm(nn.Linear(m, d)),
    "spectral_norm": lambda m, d: parametrizations.spectral_norm(nn.Linear(m, d)),
    "spectral_norm in eval mode": lambda m, d: parametrizations.spectral_norm(nn.Linear(m, d)).eval(),
    "orthogonal": lambda m, d: parametrizations.orthogonal(nn.Linear(m, d)),
    "old weight_norm": old_weight_norm,
    "old spectral_norm": lambda m, d: nn.utils.spectral_norm(nn.Linear(m, d)),
    "pruned": pruned,
    "pruned twice": pruned_twice,
    "LoRA": lora,
    "LoRA on weight_norm": lora_on_weight_norm,
}
