"""The spread of Hutchinson's estimator: the error of kappa and of its gradient, and what it costs.

    python -m recipes.benchmark.estimators                      # into runs/estimator_spread
    python -m recipes.benchmark.estimators --smoke
    python -m recipes.benchmark.estimators --plot results.json   # redraw

kappa is a trace, of one large matrix in weight space or of a sum of small ones, one per row of z, all of
which share a Hessian-vector product (benchmark.estimators_extra). Compared, with equal numbers of products:

    library   mode="hutchinson" as it is, its check that rows do not interact included: of the observed
              layer ("row") and of the bare parameter ("weight", what a convolution gets)
    signs     independent signs: the same two, without the check
    orthogonal, split, structured, singular    see recipes.benchmark.estimators_extra

All are unbiased, shown by the mean of the values, and of the gradients along the exact one, in standard
errors. The standard deviation of the value is relative to kappa; that of the gradient (in all parameters)
is the root mean square distance from the exact gradient, relative to its norm. The time is that of the
estimate and its gradient, without the forward that they share with the loss. The figure of merit is the
standard deviation at one millisecond, ``deviation * sqrt(milliseconds)``: means of independent estimates
stay on one such line. Before training and after.
"""

import argparse
import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # draws to files, needs no display

import matplotlib.pyplot as plt
import torch
from matplotlib.ticker import NullFormatter
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fam_optim import observe, relative_flatness
from recipes.benchmark.estimators_extra import ESTIMATORS, Forward
from recipes.shared.results import load, record, save
from recipes.tasks.images import fashion_mnist

WIDTH = 64
BATCH = 128
"""The network: Linear(784, 64), Tanh, Linear(64, 64), Tanh, Linear(64, 10)."""
LAYERS = {"hidden 64x64": 2, "head 10x64": 4}
PRODUCTS = (1, 4, 12)
Call = Callable[[], Tensor]


def network() -> nn.Sequential:
    """A small multilayer perceptron on images."""
    return nn.Sequential(
        nn.Linear(784, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 10)
    )


def gradient(value: Tensor, model: nn.Module) -> Tensor:
    """The gradient in all parameters as one vector."""
    parameters = list(model.parameters())
    parts = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
    return torch.cat(
        [(torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(parameters, parts, strict=True)]
    )


def spread(
    model: nn.Sequential, index: int, x: Tensor, y: Tensor, draws: int, products: Sequence[int]
) -> list[dict[str, Any]]:
    """One row per estimator and number of products, of one layer; the first is the exact mode."""
    module = model[index]
    assert isinstance(module, nn.Linear)
    parameter = module.weight
    assert isinstance(parameter, nn.Parameter)
    with observe(module) as layer:
        kept: list[Tensor] = []
        handle = module.register_forward_hook(lambda module, inputs, output: kept.extend((*inputs, output)))
        loss = cross_entropy(model(x), y)
        handle.remove()
    forward = Forward(loss, kept[0], kept[1], parameter)

    calls: dict[tuple[str, int], Call] = {("exact", 0): partial(relative_flatness, loss, layer)}
    for n in products:
        for name, of in (("library, row", layer), ("library, weight", parameter)):
            calls[name, n] = partial(relative_flatness, loss, of, mode="hutchinson", n_samples=n)
        for name, estimator in ESTIMATORS.items():
            if estimator.possible(forward, n):
                calls[name, n] = partial(estimator.run, forward, n)
    return [
        {"estimator": name, "products": n, **figures}
        for (name, n), figures in alternate(calls, model, draws).items()
    ]


def alternate(
    calls: Mapping[tuple[str, int], Call], model: nn.Module, draws: int
) -> dict[tuple[str, int], dict[str, float]]:
    """Values, gradients and times of all estimators in alternation, beside the first one, which is exact."""
    first = next(iter(calls))
    exact = calls[first]()
    exact_gradient = gradient(exact, model)
    kappa, norm = exact.item(), exact_gradient.norm().item()
    drawn: dict[tuple[str, int], list[tuple[float, float, float, float]]] = {key: [] for key in calls}
    order = list(calls)
    for _ in range(draws):
        random.shuffle(order)  # a call may leave the caches cold for the next one
        for key in order:
            begin = time.perf_counter()
            value = calls[key]()
            by_parameters = gradient(value, model)
            seconds = time.perf_counter() - begin
            along = (by_parameters @ exact_gradient).item() / norm**2
            distance = (by_parameters - exact_gradient).norm().item() / norm
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
    result = Table("estimator", "products", *heads, box=box.MARKDOWN)
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


def plot(source: Path, target: Path) -> None:
    """Draw errors by milliseconds, a column per network, values above and gradients below."""
    runs = [run for run in load(source)["runs"] if run["estimator"] != "exact"]
    networks = list(dict.fromkeys((run["stage"], run["layer"]) for run in runs))
    names = list(dict.fromkeys(run["estimator"] for run in runs))
    colours = dict(zip(names, plt.get_cmap("tab20").colors, strict=False))  # type: ignore[attr-defined]
    figure, axes = plt.subplots(2, len(networks), figsize=(3.2 * len(networks), 6.4), squeeze=False)
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
            axis.set(xscale="log", yscale="log", xlabel="milliseconds")
            what = "deviation of kappa" if quantity == "value" else "error of the gradient"
            axis.set_title(f"{what}\n{layer}, {stage}", loc="left", fontsize=9)
            axis.xaxis.set_minor_formatter(NullFormatter())
            axis.yaxis.set_minor_formatter(NullFormatter())
            axis.grid(alpha=0.25, which="both")
            axis.spines[["top", "right"]].set_visible(False)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=5, frameon=False, fontsize=8)
    figure.tight_layout(rect=(0, 0.08, 1, 1))
    figure.savefig(target, dpi=120)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, save, draw."""
    parser = argparse.ArgumentParser(
        prog="python -m recipes.benchmark.estimators", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--draws", type=int, default=300, help="of every estimator")
    parser.add_argument("--steps", type=int, default=300, help="of training, for the trained network")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/estimator_spread"))
    parser.add_argument("--plot", type=Path, metavar="JSON", help="redraw the picture of these results only")
    parser.add_argument("--smoke", action="store_true", help="few draws and steps: a test, no result")
    options = parser.parse_args(arguments)
    if options.plot:
        plot(options.plot, options.plot.with_suffix(".png"))
        return
    products: Sequence[int] = PRODUCTS
    if options.smoke:
        options.draws, options.steps, products = 4, 3, (1, 4)
    torch.manual_seed(options.seed)
    torch.set_num_threads(options.threads)
    begin = time.perf_counter()
    images, labels = fashion_mnist("train")
    order = torch.randperm(len(labels))
    batches = [(images[part].flatten(1), labels[part]) for part in torch.split(order, BATCH)]
    model = network()
    runs = []
    for stage, steps in (("untrained", 0), ("trained", options.steps)):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for step in range(steps):
            x, y = batches[step % len(batches)]
            optimizer.zero_grad()
            cross_entropy(model(x), y).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        for name, index in LAYERS.items():
            rows = spread(model, index, *batches[0], options.draws, products)
            runs += [{"stage": stage, "layer": name, **row} for row in rows]
    path = options.out / "estimator_spread.json"
    configuration = {key: value for key, value in vars(options).items() if key not in ("out", "plot")}
    save(path, record("estimator_spread", configuration, time.perf_counter() - begin, runs))
    Console(width=240).print(table(runs))
    print(f"largest bias: {largest_bias(runs):.1f} standard errors, of {2 * len(runs)}")
    plot(path, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
