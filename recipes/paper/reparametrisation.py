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

import argparse
import copy
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # draws to files, needs no display

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fam_optim import dataset_relative_flatness
from recipes.shared.results import load, record, save
from recipes.tasks.images import fashion_mnist

WIDTH = 64
"""The network: Linear(784, 64), ReLU, Linear(64, 10)."""
LAYERS = {"hidden": 1, "last": 3}
EXPONENTS = tuple(k / 3 for k in range(-12, 13))  # alpha = 2^exponent, from 1/16 to 16
LR, BATCH_SIZE = 0.1, 64
COLOURS = {"kappa": "#e69f00", "kappa_hat": "#0072b2", "trace": "#555555"}
NAMES = {"kappa": "kappa", "kappa_hat": "||W||² Tr(H)", "trace": "Tr(H)"}
Batches = Sequence[tuple[Tensor, Tensor]]


def network() -> nn.Sequential:
    """A small multilayer perceptron on images."""
    return nn.Sequential(nn.Flatten(), nn.Linear(784, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 10))


def train(model: nn.Module, images: Tensor, labels: Tensor, epochs: int) -> None:
    """Plain SGD."""
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    for _ in range(epochs):
        order = torch.randperm(len(labels))
        for x, y in batches(images[order], labels[order], BATCH_SIZE):
            optimizer.zero_grad()
            cross_entropy(model(x), y).backward()  # type: ignore[no-untyped-call]
            optimizer.step()


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


def sweep(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Train, then one row per layer and alpha."""
    images, labels = (tensor[: options.images] for tensor in fashion_mnist("train"))
    torch.manual_seed(options.seed)
    model = network()
    train(model, images, labels, options.epochs)
    model.double()
    training = batches(images.double(), labels)
    test_images, test_labels = fashion_mnist("test")
    test = batches(test_images.double(), test_labels)
    runs = []
    for name, index in LAYERS.items():
        for exponent in options.exponents:
            twin = rescaled(model, 2.0**exponent)
            layer = twin[index]
            assert isinstance(layer, nn.Linear)
            row = {"layer": name, "alpha": 2.0**exponent, "test_accuracy": accuracy(twin, test)}
            runs.append({**row, **measure(twin, layer, training)})
    return runs


def with_changes(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with every quantity's value relative to that of the same layer at alpha = 1, minus one."""
    origins = {run["layer"]: run for run in runs if run["alpha"] == 1}
    return [
        {**run, **{f"{name}_change": run[name] / origins[run["layer"]][name] - 1 for name in NAMES}}
        for run in runs
    ]


def table(runs: Sequence[dict[str, Any]]) -> Table:
    """One line per layer and whole power of two."""
    result = Table("layer", "alpha", *NAMES.values(), "test acc.", box=box.MARKDOWN)
    for run in runs:
        if math.log2(run["alpha"]).is_integer():
            quantities = (f"{run[name]:.5g}" for name in NAMES)
            result.add_row(run["layer"], f"{run['alpha']:g}", *quantities, f"{run['test_accuracy']:.2f}")
    return result


def plot(source: Path, target: Path) -> None:
    """Draw one panel per layer: each quantity relative to its value at alpha = 1, by alpha."""
    runs = load(source)["runs"]
    figure, axes = plt.subplots(1, len(LAYERS), figsize=(9, 4), sharey=True)
    for axis, layer in zip(axes, LAYERS, strict=True):
        draw(axis, [run for run in runs if run["layer"] == layer])
        axis.set_title(f"{layer} layer, relative to alpha = 1", loc="left", fontsize=10)
    axes[0].legend(frameon=False)
    figure.tight_layout()
    figure.savefig(target, dpi=120)
    plt.close(figure)


def draw(axis: Axes, runs: Sequence[dict[str, Any]]) -> None:
    """Draw the quantities of one layer; kappa_hat as dots, since it lies on kappa."""
    alphas = np.array([run["alpha"] for run in runs])
    for name, style in (("trace", "-"), ("kappa", "-"), ("kappa_hat", "o")):
        relative = 1 + np.array([run[f"{name}_change"] for run in runs])
        axis.plot(alphas, relative, style, color=COLOURS[name], linewidth=2, markersize=4, label=NAMES[name])
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.xaxis.set_major_formatter(lambda alpha, _: f"{alpha:g}" if alpha >= 1 else f"1/{1 / alpha:g}")
    axis.set_xlabel("alpha")
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, save, print the table, draw the picture."""
    parser = argparse.ArgumentParser(
        prog="python -m recipes.paper.reparametrisation", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--images", type=int, default=4000, help="of the training set")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/reparametrisation"))
    parser.add_argument("--plot", type=Path, metavar="JSON", help="redraw the picture of these results only")
    parser.add_argument("--smoke", action="store_true", help="few images and alphas: a test, no result")
    options = parser.parse_args(arguments)
    if options.plot:
        plot(options.plot, options.plot.with_suffix(".png"))
        return
    options.exponents = EXPONENTS
    if options.smoke:
        options.images, options.epochs, options.exponents = 500, 1, EXPONENTS[::4]
    begin = time.perf_counter()
    runs = with_changes(sweep(options))
    path = options.out / "reparametrisation.json"
    chosen = {key: value for key, value in vars(options).items() if key not in ("out", "plot")}
    configuration = {"width": WIDTH, "lr": LR, "batch_size": BATCH_SIZE, **chosen}
    save(path, record("reparametrisation", configuration, time.perf_counter() - begin, runs))
    console = Console(width=110)
    console.print(table(runs))
    largest = max(abs(run["kappa_change"]) for run in runs)
    console.print(f"largest relative deviation of kappa: {largest:.1e}")
    plot(path, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
