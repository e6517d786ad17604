"""The spread of Hutchinson's estimator: the error of kappa and of its gradient, and what it costs.

    python -m recipes.benchmark.estimators                      # into runs/estimator_spread
    python -m recipes.benchmark.estimators --curvature gauss_newton --out runs/gauss_newton_spread
    python -m recipes.benchmark.estimators --smoke
    python -m recipes.benchmark.estimators --plot results.json   # redraw

kappa is a trace, of one large matrix in weight space or of a sum of small ones, one per row of z, all of
which share a Hessian-vector product. Compared, with equal numbers of products:

    library, row       mode="hutchinson" of the observed layer, its check that rows do not interact included
    library, weight    the same of the bare parameter: what a convolution gets

Gauss-Newton curvature has two forms of its estimate, of which each layer gets one:

    library, apart     the sum of squares, of every row or of every sample by itself
    library, whole     the square of the whole batch's sum

All are unbiased, shown by the mean of the values, and of the gradients along the exact one, in standard
errors. The standard deviation of the value is relative to kappa; that of the gradient (in all parameters)
is the root mean square distance from the exact gradient, relative to its norm. The time is that of the
estimate and its gradient, without the forward that they share with the loss. The figure of merit is the
standard deviation at one millisecond, ``deviation * sqrt(milliseconds)``: means of independent estimates
stay on one such line. Before training and after.
"""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fam_optim import observe, relative_flatness
from recipes.shared.command import Options, Recipe, positive
from recipes.shared.pictures import legend_above, panels, tidy
from recipes.shared.problem import Problem
from recipes.shared.tables import table as make_table
from recipes.shared.timing import turns
from recipes.tasks.images import fashion_mnist

WIDTH = 64
BATCH = 128
LAYERS = {"hidden 64x64": 2, "head 10x64": 4}
PRODUCTS = (1, 4, 12)
Call = Callable[[], Tensor]


def network() -> nn.Sequential:
    """A small multilayer perceptron on images ``(N, 784)``."""
    return nn.Sequential(
        nn.Linear(784, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 10)
    )


def convolutional() -> nn.Sequential:
    """A small convolutional network on images ``(N, 784)``, whose samples do not interact."""
    first, second = nn.Conv2d(1, 16, 3, 2), nn.Conv2d(16, 32, 3, 2)
    body = nn.Unflatten(1, (1, 28, 28)), first, nn.Tanh(), second, nn.Tanh(), nn.Flatten()
    return nn.Sequential(*body, nn.Linear(32 * 36, 10))


def spread(problem: Problem, draws: int, products: Sequence[int], curvature: str) -> list[dict[str, Any]]:
    """One row per estimator and number of products, of one layer; the first is the exact mode."""
    with observe(problem.layer) as layer:
        loss = problem.loss()
    kappa = partial(relative_flatness, loss, curvature=curvature)
    calls: dict[tuple[str, int], Call] = {("exact", 0): partial(kappa, layer)}
    names = ("row", "weight") if curvature == "hessian" else ("apart", "whole")
    for n in products:
        for name, of in zip(names, (layer, problem.weight), strict=True):
            calls[f"library, {name}", n] = partial(kappa, of, mode="hutchinson", n_samples=n)
    return [
        {"estimator": name, "products": n, **figures}
        for (name, n), figures in errors(calls, problem, draws).items()
    ]


def errors(
    calls: Mapping[tuple[str, int], Call], problem: Problem, draws: int
) -> dict[tuple[str, int], dict[str, float]]:
    """Values, gradients and times of all estimators in alternation, beside the first one, which is exact."""
    first = next(iter(calls))
    exact = calls[first]()
    exact_gradient = problem.gradient(exact, retain_graph=True)
    kappa, norm = exact.item(), exact_gradient.norm().item()
    drawn: dict[tuple[str, int], list[tuple[float, float, float, float]]] = {key: [] for key in calls}

    def with_gradient(call: Call) -> tuple[Tensor, Tensor]:
        value = call()
        return value, problem.gradient(value, retain_graph=True)

    pairs = {key: partial(with_gradient, call) for key, call in calls.items()}
    for key, seconds, (value, gradient) in turns(pairs, draws):
        along = (gradient @ exact_gradient).item() / norm**2
        distance = (gradient - exact_gradient).norm().item() / norm
        drawn[key].append((value.item() / kappa, along, distance, 1000 * seconds))
    figures = {}
    for key, samples in drawn.items():
        values, alongs, distances, milliseconds = zip(*samples, strict=True)
        took = statistics.median(milliseconds)
        deviation = statistics.stdev(values)
        error = math.sqrt(statistics.fmean(distance**2 for distance in distances))
        figures[key] = {
            "kappa": kappa,
            "value": deviation,
            "gradient": error,
            "milliseconds": took,
            "value_at_one_millisecond": deviation * math.sqrt(took),
            "gradient_at_one_millisecond": error * math.sqrt(took),
            "bias_in_standard_errors": bias(values),
            "gradient_bias_in_standard_errors": bias(alongs),
        }
    return figures


def bias(ratios: Sequence[float]) -> float:
    """How far the mean is from one, in its standard errors."""
    error = statistics.stdev(ratios) / math.sqrt(len(ratios))
    return (statistics.fmean(ratios) - 1) / error if error > 1e-6 else 0.0


def table(runs: Sequence[Mapping[str, Any]]) -> Table:
    """A row per estimator and number of products, a column per network: the gradient's error, and at 1 ms."""
    networks = list(dict.fromkeys((run["stage"], run["layer"]) for run in runs))
    by_key: dict[tuple[str, int], dict[tuple[str, str], Mapping[str, Any]]] = {}
    for run in runs:
        by_key.setdefault((run["estimator"], run["products"]), {})[run["stage"], run["layer"]] = run
    heads = [f"{layer}, {stage}: error in ms (at 1 ms)" for stage, layer in networks]
    result = make_table("estimator", "products", *heads)
    for (name, products), found in by_key.items():
        cells = [
            f"{r['gradient']:.2f} in {r['milliseconds']:.1f} ({r['gradient_at_one_millisecond']:.2f})"
            if (r := found.get(network))
            else ""
            for network in networks
        ]
        result.add_row(name, str(products) if products else "", *cells)
    return result


def largest_bias(runs: Sequence[Mapping[str, Any]]) -> float:
    """Of all values and gradients, in standard errors."""
    names = ("bias_in_standard_errors", "gradient_bias_in_standard_errors")
    return max(abs(float(run[name])) for run in runs for name in names)


def plot(results: Mapping[str, Any]) -> Figure:
    """Errors by milliseconds, a column per network, values above and gradients below."""
    runs = [run for run in results["runs"] if run["estimator"] != "exact"]
    networks = list(dict.fromkeys((run["stage"], run["layer"]) for run in runs))
    names = list(dict.fromkeys(run["estimator"] for run in runs))
    colours = dict(zip(names, colormaps["tab20"].colors, strict=False))  # type: ignore[attr-defined]
    figure, axes = panels(2, len(networks), 2.6 * len(networks), 6.2)
    for column, (stage, layer) in zip(axes.T, networks, strict=True):
        for axis, quantity in zip(column, ("value", "gradient"), strict=True):
            for name in names:
                key = (stage, layer, name)
                chosen = [run for run in runs if (run["stage"], run["layer"], run["estimator"]) == key]
                axis.plot(
                    [run["milliseconds"] for run in chosen],
                    [run[quantity] for run in chosen],
                    "s-" if "weight" in name else "o-",
                    color=colours[name],
                    markersize=3.5,
                    linewidth=1,
                    label=name,
                )
            what = "deviation of kappa" if quantity == "value" else "error of the gradient"
            axis.set(xlabel="time of an estimate (ms)", ylabel=f"relative {what}")
            tidy(axis, f"{layer}, {stage}", log="xy")
    legend_above(figure, axes[0, 0], 4)
    return figure


def measure(options: Options) -> list[dict[str, Any]]:
    """The layers of the network, or of both, before training and after."""
    products = PRODUCTS[:1] if options.smoke else PRODUCTS
    images, labels = fashion_mnist("train")
    order = torch.randperm(len(labels))
    batches = [(images[part].flatten(1), labels[part]) for part in torch.split(order, BATCH)]
    networks = [(network(), LAYERS)]
    if options.curvature == "gauss_newton":
        networks.append((convolutional(), {"convolution 32x144": 3}))
    runs = []
    for model, layers in networks:
        for stage, steps in (("untrained", 0), ("trained", options.steps)):
            train(model, batches, steps)
            for name, index in layers.items():
                problem = Problem(model, model[index], *batches[0])
                rows = spread(problem, options.draws, products, options.curvature)
                runs += [{"stage": stage, "layer": name, **row} for row in rows]
    return runs


def train(model: nn.Module, batches: Sequence[tuple[Tensor, Tensor]], steps: int) -> None:
    """With SGD, over and over."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for step in range(steps):
        x, y = batches[step % len(batches)]
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()  # type: ignore[no-untyped-call]
        optimizer.step()


def bias_found(runs: Sequence[dict[str, Any]]) -> str:
    """The largest, for the reader."""
    return f"largest bias: {largest_bias(runs):.1f} standard errors, of {2 * len(runs)}"


OPTIONS: dict[str, dict[str, Any]] = {
    "--draws": {"type": positive, "default": 300, "help": "of every estimator"},
    "--curvature": {"choices": ("hessian", "gauss_newton"), "default": "hessian"},
    "--steps": {"type": positive, "default": 300, "help": "of training, for the trained network"},
}
SMOKE = {"draws": 4, "steps": 3}
RECIPE = Recipe("benchmark.estimators", __doc__, measure, table, plot, OPTIONS, SMOKE, bias_found)
main = RECIPE.main

if __name__ == "__main__":
    main()
