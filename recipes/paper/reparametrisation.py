"""Shows that rescaling a network without changing its function changes the Hessian's trace, but not kappa.

A ReLU network is trained with SGD on Fashion-MNIST. Then its hidden layer's weight and bias are multiplied
by alpha and the last layer's weight is divided by alpha, which leaves its function as it is, since
relu(alpha z) = alpha relu(z) for alpha > 0. Both layers are measured on the training set, in float64:

    kappa        sum_{s,u} <w_s, w_u> Tr(H_{s,u})    unchanged
    kappa_hat    ||W||^2 Tr(H)                       unchanged
    Tr(H)        proportional to alpha^-2 (hidden), alpha^2 (last)
"""

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fam_optim import dataset_relative_flatness
from recipes.shared.command import Options, Recipe, positive
from recipes.shared.pictures import BLUE, GREY, ORANGE, legend_above, panels, tidy
from recipes.shared.problem import train_plainly
from recipes.shared.tables import table as make_table
from recipes.tasks.images import fashion_mnist

EXPONENTS = tuple(k / 3 for k in range(-12, 13))  # alpha = 2^exponent, from 1/16 to 16
QUANTITIES = {
    "trace": ("Tr(H)", "-", GREY),
    "kappa": ("kappa", "-", ORANGE),
    "kappa_hat": ("||W||² Tr(H)", "o", BLUE),
}
Batches = Sequence[tuple[Tensor, Tensor]]


def batches(images: Tensor, labels: Tensor, size: int) -> Batches:
    """Returns every sample once, in order."""
    return list(zip(torch.split(images, size), torch.split(labels, size), strict=True))


def measure(model: nn.Module, layer: nn.Module, data: Batches) -> dict[str, float]:
    """Returns the three quantities of one layer."""
    kappa, kappa_hat = (
        dataset_relative_flatness(model, layer, cross_entropy, data, measure=name).item()
        for name in ("neuronwise", "layerwise")
    )
    weight = layer.get_parameter("weight")
    return {"kappa": kappa, "kappa_hat": kappa_hat, "trace": kappa_hat / weight.square().sum().item()}


@torch.no_grad()
def rescaled(model: nn.Sequential, alpha: float) -> nn.Sequential:
    """Returns a copy with the hidden layer times alpha, and the last layer's weight divided by alpha."""
    twin = copy.deepcopy(model)
    for name, factor in (("1.weight", alpha), ("1.bias", alpha), ("3.weight", 1 / alpha)):
        twin.get_parameter(name).mul_(factor)
    return twin


def sweep(options: Options) -> Iterator[dict[str, Any]]:
    """Trains, then yields a row per layer and alpha, with each quantity's change from alpha = 1."""
    images, labels = (tensor[: options.images] for tensor in fashion_mnist("train"))
    torch.manual_seed(options.seed)
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 10))
    for _ in range(options.epochs):
        order = torch.randperm(len(labels))
        train_plainly(model, batches(images[order], labels[order], 64))
    model.double()
    training = batches(images.double(), labels, 250)
    exponents = EXPONENTS[::4] if options.smoke else EXPONENTS
    for name, index in {"hidden": 1, "last": 3}.items():
        origin = measure(model, model[index], training)
        for alpha in (2.0**exponent for exponent in exponents):
            twin = rescaled(model, alpha)
            found = measure(twin, twin[index], training)
            changes = {f"{quantity}_change": found[quantity] / origin[quantity] - 1 for quantity in found}
            yield {"layer": name, "alpha": alpha, **found, **changes}


def table(runs: Sequence[dict[str, Any]]) -> Table:
    """Makes a table with one line per layer and whole power of two."""
    rows = [
        [run["layer"], f"{run['alpha']:g}", *(f"{run[name]:.5g}" for name in QUANTITIES)]
        for run in runs
        if math.log2(run["alpha"]).is_integer()
    ]
    title = f"largest relative deviation of kappa: {max(abs(run['kappa_change']) for run in runs):.1e}"
    heads = (name for name, *_ in QUANTITIES.values())
    return make_table("layer", "alpha", *heads, rows=rows, title=title)


def plot(results: Mapping[str, Any]) -> Figure:
    """Draws a panel per layer: each quantity relative to its value at alpha = 1, by alpha."""
    figure, axes = panels(1, 2, 8, 3.8, sharey=True)
    for axis, layer in zip(axes[0], ("hidden", "last"), strict=True):
        runs = [run for run in results["runs"] if run["layer"] == layer]
        alphas = np.array([run["alpha"] for run in runs])
        for name, (label, style, colour) in QUANTITIES.items():  # kappa_hat is dots, since it lies on kappa
            relative = 1 + np.array([run[f"{name}_change"] for run in runs])
            axis.plot(alphas, relative, style, color=colour, markersize=4, label=label)
        axis.set_xlabel("alpha, the factor of the hidden layer's weights")
        tidy(axis, f"{layer} layer", log="y")
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter(lambda alpha, _: f"{alpha:g}" if alpha >= 1 else f"1/{1 / alpha:g}")
    axes[0, 0].set_ylabel("value relative to alpha = 1 (a factor)")
    legend_above(figure, axes[0, 0], len(QUANTITIES))
    return figure


OPTIONS: dict[str, dict[str, Any]] = {
    "--epochs": {"type": positive, "default": 10, "help": "(default: 10)"},
    "--images": {"type": positive, "default": 4000, "help": "training images (default: 4000)"},
}
main = Recipe(
    "paper.reparametrisation", __doc__, sweep, table, plot, OPTIONS, {"images": 500, "epochs": 1}
).main

if __name__ == "__main__":
    main()
