"""Measures the error of a random estimate of kappa and of its gradient, and the time that they take.

    python -m recipes.benchmark.estimators --curvature gauss_newton --out runs/gauss_newton

It compares these with the exact mode, before training and after, with equal numbers of products:

    library, row       Hutchinson's estimate of the observed layer, every row with signs of its own
    library, weight    Hutchinson's estimate of the bare parameter, as a convolution gets it
    library, apart     Gauss-Newton: the square of every row or sample by itself, summed up
    library, whole     Gauss-Newton: the square of the whole batch's sum

All are unbiased. The error of the gradient (in all parameters) is the root mean square distance from the
exact one, relative to its norm. The time is that of the estimate and its gradient. A mean of independent
estimates has the same ``error * sqrt(milliseconds)``, which is the error at one millisecond.
"""

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import cycle, islice
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.table import Table
from torch import Tensor, nn

from fam_optim import observe, relative_flatness
from recipes.shared.command import Options, Recipe, positive
from recipes.shared.pictures import draw_lines, legend_above, looks, panels, tidy
from recipes.shared.problem import Problem, train_plainly
from recipes.shared.results import grouped
from recipes.shared.tables import pivot
from recipes.shared.timing import turns
from recipes.tasks.images import fashion_mnist

WIDTH, BATCH = 64, 128
LAYERS = {"hidden 64x64": 2, "head 10x64": 4}
PRODUCTS = (1, 4, 12)
NAMES = {"hessian": ("row", "weight"), "gauss_newton": ("apart", "whole")}
Key = tuple[str, int]  # an estimator and its number of products


def network() -> nn.Sequential:
    """Returns a small multilayer perceptron on images ``(N, 784)``."""
    first, second, head = nn.Linear(784, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 10)
    return nn.Sequential(first, nn.Tanh(), second, nn.Tanh(), head)


def convolutional() -> nn.Sequential:
    """Returns a small convolutional network on images ``(N, 784)``, whose samples do not interact."""
    first, second = nn.Conv2d(1, 16, 3, 2), nn.Conv2d(16, 32, 3, 2)
    body = nn.Unflatten(1, (1, 28, 28)), first, nn.Tanh(), second, nn.Tanh(), nn.Flatten()
    return nn.Sequential(*body, nn.Linear(32 * 36, 10))


def spread(problem: Problem, draws: int, products: Sequence[int], curvature: str) -> list[dict[str, Any]]:
    """Returns a row per estimator and number of products, for one layer; the first is the exact mode."""
    with observe(problem.layer) as layer:
        loss = problem.loss()
    kappa = partial(relative_flatness, loss, curvature=curvature)
    calls: dict[Key, Callable[[], Tensor]] = {("exact", 0): partial(kappa, layer)}
    for n in products:
        for name, of in zip(NAMES[curvature], (layer, problem.weight), strict=True):
            calls[f"library, {name}", n] = partial(kappa, of, mode="hutchinson", n_samples=n)

    def with_gradient(call: Callable[[], Tensor]) -> tuple[float, Tensor]:
        value = call()
        return value.item(), problem.gradient(value, retain_graph=True)

    pairs = {key: partial(with_gradient, call) for key, call in calls.items()}
    exact, exact_gradient = pairs["exact", 0]()
    drawn: dict[Key, list[tuple[float, float, float]]] = {key: [] for key in calls}
    for key, seconds, (value, gradient) in turns(pairs, draws):
        distance = ((gradient - exact_gradient).norm() / exact_gradient.norm()).item()
        drawn[key].append((value / exact, distance, 1000 * seconds))
    rows = []
    for (name, n), samples in drawn.items():
        values, distances, milliseconds = zip(*samples, strict=True)
        row = {"estimator": name, "products": n, "kappa": exact, "value": statistics.stdev(values)}
        row["gradient"] = math.sqrt(statistics.fmean(distance**2 for distance in distances))
        rows.append({**row, "milliseconds": statistics.median(milliseconds)})
    return rows


def table(runs: Sequence[Mapping[str, Any]]) -> Table:
    """Makes a table of the gradient's error: a row per estimator and its products, a column per network."""

    def cell(run: Mapping[str, Any]) -> str:
        error, took = run["gradient"], run["milliseconds"]
        return f"{error:.2f} in {took:.1f} ({error * math.sqrt(took):.2f})"

    return pivot(
        ("estimator", "products"),
        runs,
        line=lambda run: (run["estimator"], str(run["products"] or "")),
        column=lambda run: f"{network_of(run)}: error in ms (at 1 ms)",
        cell=cell,
    )


def network_of(run: Mapping[str, Any]) -> str:
    """Returns the layer and the stage of a row."""
    return f"{run['layer']}, {run['stage']}"


def plot(results: Mapping[str, Any]) -> Figure:
    """Draws the gradient's error by milliseconds, a panel per network."""
    runs = [run for run in results["runs"] if run["estimator"] != "exact"]
    networks, chosen = grouped(runs, network_of), looks(run["estimator"] for run in runs)
    figure, axes = panels(1, len(networks), 0.8 + 2.2 * len(networks), 3, sharey=True)
    for axis, (name, own) in zip(axes[0], networks.items(), strict=True):
        draw_lines(axis, own, "milliseconds", "gradient", "estimator", chosen)
        axis.set_xlabel("time (ms)")
        tidy(axis, name, log="xy")
    axes[0, 0].set_ylabel("error of the gradient (a fraction)")
    legend_above(figure, axes[0, 0], len(chosen))
    return figure


def measure(options: Options) -> Iterator[dict[str, Any]]:
    """Yields the rows of all layers, before training and after; convolutions for Gauss-Newton only."""
    products = PRODUCTS[:1] if options.smoke else PRODUCTS
    images, labels = fashion_mnist("train")
    order = torch.randperm(len(labels))
    batches = [(images[part].flatten(1), labels[part]) for part in torch.split(order, BATCH)]
    networks = [(network(), LAYERS)]
    if options.curvature == "gauss_newton":
        networks.append((convolutional(), {"convolution 32x144": 3}))
    for model, layers in networks:
        for stage, steps in (("untrained", 0), ("trained", options.steps)):
            train_plainly(model, islice(cycle(batches), steps), momentum=0.9)
            for name, index in layers.items():
                problem = Problem(model, model[index], *batches[0])
                rows = spread(problem, options.draws, products, options.curvature)
                yield from ({"stage": stage, "layer": name, **row} for row in rows)


OPTIONS: dict[str, dict[str, Any]] = {
    "--draws": {"type": positive, "default": 300, "help": "estimates of each kind (default: 300)"},
    "--curvature": {
        "choices": ("hessian", "gauss_newton"),
        "default": "hessian",
        "help": "(default: hessian)",
    },
    "--steps": {"type": positive, "default": 300, "help": "of the training before (default: 300)"},
}
main = Recipe("benchmark.estimators", __doc__, measure, table, plot, OPTIONS, {"draws": 4, "steps": 3}).main

if __name__ == "__main__":
    main()
