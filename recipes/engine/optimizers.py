"""Builds the optimizers of all tasks: SGD, Adam and their variants, alone or inside SAM, LookSAM or FAM.

Settings are flat data, such as ``{"optimizer": "fam", "base": "sgd", "lr": 0.03, "lam": 0.1}``; a run's
folder holds them as JSON, and ``build`` makes the optimizer.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from pytorch_optimizer import SAM, LookSAM
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW

from fam_optim import FAM
from recipes.engine.layers import select
from recipes.engine.task import Task

CLASSES = {"sgd": SGD, "nesterov": SGD, "adam": Adam, "adamw": AdamW}
BASES: dict[str, dict[str, Any]] = {  # with their usual learning rates
    "sgd": {"lr": 0.05, "momentum": 0.9},
    "nesterov": {"lr": 0.05, "momentum": 0.9, "nesterov": True},
    "adam": {"lr": 1e-3},
    "adamw": {"lr": 1e-3},
}
WRAPPERS: dict[str, dict[str, Any]] = {
    "sam": {"rho": 0.05},
    "asam": {"rho": 0.5, "adaptive": True},
    "looksam": {"rho": 0.05, "k": 10},
    "fam": {"lam": 8e-3},
}
OPTIMIZERS = (*BASES, *WRAPPERS)
MEASURING = ("measure", "mode", "curvature", "n_samples")  # FAM's options that define kappa
FAM_OPTIONS = ("layers", "lam", "every", "normalize", "detach_hessian", *MEASURING)
SAM_OPTIONS = ("rho", "adaptive", "k")
OPTIONS = {"fam": FAM_OPTIONS, **dict.fromkeys(("sam", "asam", "looksam"), SAM_OPTIONS)}  # not their base's
# The paper's penalty, whatever the library's defaults are. Its released code divides by m.
PAPERS: dict[str, Any] = {
    "measure": "neuronwise",
    "mode": "exact",
    "curvature": "hessian",
    "detach_hessian": False,
    "normalize": True,
}
# The proximal step has the same settings in all tasks; GAUSS_NEWTON measures the kappa that it lowers.
PROXIMAL: dict[str, Any] = {"mode": "proximal", "lam": 1.0, "every": 10}
GAUSS_NEWTON: dict[str, Any] = {"curvature": "gauss_newton", "mode": "hutchinson"}

Settings = dict[str, Any]
Loss = Callable[[Any, Any], Tensor]


def settings(task: Task, optimizer: str, changes: Mapping[str, Any]) -> Settings:
    """Returns an optimizer's settings: its own defaults, then the task's values, then the changes."""
    of_task = task.methods.get(optimizer, {})
    base = of_task.get("base", task.base) if optimizer in WRAPPERS else optimizer
    own = task.options if base == task.base else {}  # SGD's learning rate says nothing about Adam's
    wrapper = {**WRAPPERS.get(optimizer, {}), **of_task}
    return {"optimizer": optimizer, "base": base, **BASES[base], **own, **wrapper, **changes}


def build(
    settings: Settings,
    model: nn.Module,
    layers: Sequence[nn.Module] = (),
    generator: torch.Generator | None = None,
) -> torch.optim.Optimizer:
    """Builds the optimizer of a model's parameters. FAM regularises the settings' layers, or ``layers``."""
    options = dict(settings)
    name, base = options.pop("optimizer"), CLASSES[options.pop("base")]
    parameters = model.parameters()
    if name == "fam":
        own = options.pop("layers", None)
        chosen = select(model, own) if own else list(layers)
        return FAM(parameters, base, chosen, generator=generator, **options)
    sam: Any = {"sam": SAM, "asam": SAM, "looksam": LookSAM}.get(name)  # Any: their types demand a class
    made: torch.optim.Optimizer = sam(parameters, base, **options) if sam else base(parameters, **options)
    return made


def plain(settings: Settings) -> Settings:
    """Returns the settings of the base optimizer without its wrapper; costs are relative to its step."""
    kept = {name: value for name, value in settings.items() if name not in (*FAM_OPTIONS, *SAM_OPTIONS)}
    return {**kept, "optimizer": settings["base"]}


def take_step(
    optimizer: torch.optim.Optimizer, model: Callable[[Any], Any], loss_fn: Loss, inputs: Any, targets: Any
) -> Tensor:
    """Takes one step on one batch, with the same closure for every optimizer. Returns the plain loss."""

    def closure() -> Any:
        optimizer.zero_grad()
        loss = loss_fn(model(inputs), targets)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    if isinstance(optimizer, (SAM, LookSAM)):
        # pytorch_optimizer's SAM wants the gradient at the weights first; its step() calls the closure once
        # more, at the perturbed weights, and returns None. That second forward pass updates BatchNorm's
        # running statistics too. Preventing this (disable_running_stats) moved the last epoch's validation
        # accuracy by at most 0.1 (40 % noise, rho 0.05 and 0.1, two seeds), so SAM is used as documented.
        # LookSAM needs the second gradient only in every k-th step, but its step() would always take it.
        loss = closure()
        if isinstance(optimizer, LookSAM) and optimizer.get_step() % optimizer.k:  # type: ignore[no-untyped-call]
            optimizer.second_step()
        else:
            optimizer.step(closure)
    else:
        loss = optimizer.step(closure)  # FAM may add lam * kappa to what is backpropagated
    plain_loss: Tensor = loss.detach()
    return plain_loss
