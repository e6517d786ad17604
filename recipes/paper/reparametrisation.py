"""Rescaling a network without changing its function leaves kappa as it is, and changes the Hessian's trace.

    python -m recipes.paper.reparametrisation                       # table, JSON, picture in runs/
    python -m recipes.paper.reparametrisation --smoke
    python -m recipes.paper.reparametrisation --plot results.json   # redraw

A ReLU network is trained with SGD on Fashion-MNIST. Then its hidden layer's weight and bias are multiplied
by alpha and the last layer's weight is divided by alpha, which leaves its function as it is, since
relu(alpha z) = alpha relu(z) for alpha > 0. Of both layers, on the training set, in float64:

    kappa        sum_{s,u} <w_s, w_u> Tr(H_{s,u})    unchanged
    kappa_hat    ||W||^2 Tr(H)                       unchanged
    Tr(H)        proportional to alpha^-2 (hidden), alpha^2 (last)

Most of the alphas are no powers of two, by which a multiplication would not even round.
"""

import copy
import math
from collections.abc import Mapping, Sequence
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

WIDTH = 64
"""The network: Linear(784, 64), ReLU, Linear(64, 10)."""
LAYERS = {"hidden": 1, "last": 3}
EXPONENTS = tuple(k / 3 for k in range(-12, 13))  # alpha = 2^exponent, from 1/16 to 16
BATCH_SIZE = 64
COLOURS = {"kappa": ORANGE, "kappa_hat": BLUE, "trace": GREY}
STYLES = {"trace": "-", "kappa": "-", "kappa_hat": "o"}
NAMES = {"kappa": "kappa", "kappa_hat": "||W||² Tr(H)", "trace": "Tr(H)"}
Batches = Sequence[tuple[Tensor, Tensor]]


def network() -> nn.Sequential:
    """A small multilayer perceptron on images."""
    return nn.Sequential(nn.Flatten(), nn.Linear(784, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 10))


def batches(images: Tensor, labels: Tensor, size: int = 250) -> Batches:
    """Every sample once, in order."""
    return list(zip(torch.split(images, size), torch.split(labels, size), strict=True))


def rescaled(model: nn.Sequential, alpha: float) -> nn.Sequential:
    """A copy with the same function: the hidden layer times alpha, the last layer's weight divided by it."""
    twin = copy.deepcopy(model)
    hidden, last = (twin[index] for index in LAYERS.values())
    assert isinstance(hidden, nn.Linear) and isinstance(last, nn.Linear)
    with torch.no_grad():
        hidden.weight.mul_(alpha)
        hidden.bias.mul_(alpha)
        last.weight.div_(alpha)
    return twin


def measure(model: nn.Sequential, layer: nn.Linear, data: Batches) -> dict[str, float]:
    """The three quantities of one layer."""
    kappa_hat = dataset_relative_flatness(model, layer, cross_entropy, data, measure="layerwise").item()
    return {
        "kappa": dataset_relative_flatness(model, layer, cross_entropy, data).item(),
        "kappa_hat": kappa_hat,
        "trace": kappa_hat / layer.weight.square().sum().item(),
    }


@torch.no_grad()
def accuracy(model: nn.Module, data: Batches) -> float:
    """Per cent of the samples whose class is predicted."""
    right = sum(int((model(x).argmax(1) == y).sum()) for x, y in data)
    return 100 * right / sum(len(y) for _, y in data)


def sweep(options: Options) -> list[dict[str, Any]]:
    """Train, then one row per layer and alpha."""
    images, labels = (tensor[: options.images] for tensor in fashion_mnist("train"))
    torch.manual_seed(options.seed)
    model = network()
    for _ in range(options.epochs):
        order = torch.randperm(len(labels))
        train_plainly(model, batches(images[order], labels[order], BATCH_SIZE))
    model.double()
    training = batches(images.double(), labels)
    test_images, test_labels = fashion_mnist("test")
    test = batches(test_images.double(), test_labels)
    exponents = EXPONENTS[::4] if options.smoke else EXPONENTS
    runs = []
    for name, index in LAYERS.items():
        for exponent in exponents:
            twin = rescaled(model, 2.0**exponent)
            layer = twin[index]
            assert isinstance(layer, nn.Linear)
            row = {"layer": name, "alpha": 2.0**exponent, "test_accuracy": accuracy(twin, test)}
            runs.append({**row, **measure(twin, layer, training)})
    return with_changes(runs)


def with_changes(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with every quantity's value relative to that of the same layer at alpha = 1, minus one."""
    origins = {run["layer"]: run for run in runs if run["alpha"] == 1}
    return [
        {**run, **{f"{name}_change": run[name] / origins[run["layer"]][name] - 1 for name in NAMES}}
        for run in runs
    ]


def table(runs: Sequence[dict[str, Any]]) -> Table:
    """One line per layer and whole power of two."""
    result = make_table("layer", "alpha", *NAMES.values(), "test accuracy, %")
    for run in runs:
        if math.log2(run["alpha"]).is_integer():
            quantities = (f"{run[name]:.5g}" for name in NAMES)
            result.add_row(run["layer"], f"{run['alpha']:g}", *quantities, f"{run['test_accuracy']:.2f}")
    return result


def plot(results: Mapping[str, Any]) -> Figure:
    """One panel per layer: each quantity relative to its value at alpha = 1, by alpha."""
    figure, axes = panels(1, len(LAYERS), 8, 3.8, sharey=True)
    for axis, layer in zip(axes[0], LAYERS, strict=True):
        runs = [run for run in results["runs"] if run["layer"] == layer]
        alphas = np.array([run["alpha"] for run in runs])
        for name, style in STYLES.items():  # kappa_hat as dots, since it lies on kappa
            relative = 1 + np.array([run[f"{name}_change"] for run in runs])
            axis.plot(alphas, relative, style, color=COLOURS[name], markersize=4, label=NAMES[name])
        axis.set_xlabel("alpha, the factor of the hidden layer's weights")
        tidy(axis, f"{layer} layer", log="y")
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter(lambda alpha, _: f"{alpha:g}" if alpha >= 1 else f"1/{1 / alpha:g}")
    axes[0, 0].set_ylabel("value relative to alpha = 1 (a factor)")
    legend_above(figure, axes[0, 0], len(NAMES))
    return figure


def largest_deviation(runs: Sequence[dict[str, Any]]) -> str:
    """How far from constant kappa is."""
    return f"largest relative deviation of kappa: {max(abs(run['kappa_change']) for run in runs):.1e}"


OPTIONS: dict[str, dict[str, Any]] = {
    "--epochs": {"type": positive, "default": 10},
    "--images": {"type": positive, "default": 4000, "help": "of the training set"},
}
SMOKE = {"images": 500, "epochs": 1}
RECIPE = Recipe("paper.reparametrisation", __doc__, sweep, table, plot, OPTIONS, SMOKE, largest_deviation)
main = RECIPE.main

if __name__ == "__main__":
    main()
