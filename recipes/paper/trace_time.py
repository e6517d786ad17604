"""The time of the trace of one layer's Hessian, and the estimator's error (figure 5 of the paper).

    python -m recipes.paper.trace_time                       # table, JSON and picture in runs/trace_time
    python -m recipes.paper.trace_time --smoke
    python -m recipes.paper.trace_time --plot results.json   # redraw

Compared, on the networks of recipes.paper.layer_timing, forward included:

    torch.func, Hessian    torch.func.hessian, then its diagonal
    torch.func, products   a Hessian-vector product (jvp of grad) per basis vector, vmapped in chunks
    exact                  relative_flatness(measure="layerwise") / ||W||^2
    hutchinson, n          the same with mode="hutchinson" and n probes
    plain step             forward and backward of the network

Before a size is timed (float32), all but the random ones are compared in float64. The error of the random
ones is the root mean square of |estimate - exact| / |exact| over repeated draws on one network, in float64.
The hidden layer's trace can be near zero by chance, since its curvatures have both signs.
"""

import argparse
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from torch import Tensor

from recipes.paper.layer_timing import Method, Problem, draw, plain_step, run, sweep, tidy
from recipes.shared.results import load

REPEATS = 20  # draws behind the error of an estimator
CHUNK = 256  # basis vectors in one vmap, so that no Hessian is formed
COLOURS = {
    "torch.func, Hessian": "#0072b2",
    "torch.func, products": "#009e73",
    "hutchinson, 100": "#7a1f4b",
    "hutchinson, 10": "#b8578a",
    "hutchinson, 1": "#e3a3c5",
    "exact": "#e69f00",
    "plain step": "#555555",
}
TITLES = {"hidden": "hidden layer, d = m", "last": "last layer, d = 10 classes"}


def diagonal_of_hessian(problem: Problem) -> Tensor:
    """The trace ``()`` of the Hessian, formed whole."""
    hessian: Tensor = torch.func.hessian(problem.loss_of_weight)(problem.layer.weight.detach())
    return torch.einsum("stst->", hessian)


def basis_products(problem: Problem) -> Tensor:
    """The trace ``()`` as the sum of ``<e, H e>`` over the basis."""
    weight = problem.layer.weight.detach()
    gradient = torch.func.grad(problem.loss_of_weight)

    def curvature(index: Tensor) -> Tensor:
        direction = (torch.arange(weight.numel()) == index).to(weight.dtype).view_as(weight)
        product: Tensor = torch.func.jvp(gradient, (weight,), (direction,))[1]
        return (direction * product).sum()

    curvatures: Tensor = torch.func.vmap(curvature, chunk_size=CHUNK)(torch.arange(weight.numel()))
    return curvatures.sum()


def exact(problem: Problem) -> Tensor:
    """The trace ``()`` from kappa_hat = ||W||^2 Tr(H)."""
    return problem.flatness(measure="layerwise") / problem.layer.weight.detach().square().sum()


def hutchinson(probes: int) -> Callable[[Problem], Tensor]:
    """The same, estimated."""

    def trace(problem: Problem) -> Tensor:
        kappa_hat = problem.flatness(measure="layerwise", mode="hutchinson", n_samples=probes)
        return kappa_hat / problem.layer.weight.detach().square().sum()

    return trace


ESTIMATORS = {f"hutchinson, {probes}": Method(hutchinson(probes), answer=None) for probes in (1, 10, 100)}
METHODS = {
    "plain step": Method(plain_step, answer=None),
    "exact": Method(exact),
    **ESTIMATORS,
    "torch.func, products": Method(basis_products, quadratic=True),
    "torch.func, Hessian": Method(diagonal_of_hessian, quadratic=True),
}


def relative_error(problem: Problem, method: Method, repeats: int) -> float:
    """Root mean square of the estimates' distance from the trace, relative to it."""
    trace = exact(problem).item()
    return math.sqrt(statistics.fmean((method.run(problem).item() / trace - 1) ** 2 for _ in range(repeats)))


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per layer and method, the estimators' with their error."""
    runs = []
    repeats = 2 if options.smoke else REPEATS
    for problem, row in sweep(METHODS, exact, options):
        if row["method"] in ESTIMATORS:
            row["error"] = relative_error(problem.double(), ESTIMATORS[row["method"]], repeats)
            row["error_repeats"] = repeats
        runs.append(row)
    return runs


def draw_errors(axis: Axes, runs: Sequence[dict[str, Any]]) -> None:
    """Draw the relative error of each estimator by number of weights."""
    for method in ESTIMATORS:
        chosen = [run for run in runs if run["method"] == method]
        weights, errors = [run["weights"] for run in chosen], [run["error"] for run in chosen]
        axis.plot(weights, errors, color=COLOURS[method], linewidth=1.8, marker="o", markersize=3)
        axis.annotate(
            f"n = {method.rpartition(' ')[2]}",
            (weights[-1], errors[-1]),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            color=COLOURS[method],
        )
    tidy(axis)


def plot(source: Path, target: Path) -> None:
    """Draw one column per family: seconds above, the estimators' error below."""
    runs = load(source)["runs"]
    heights = {"height_ratios": (3, 2)}
    figure, axes = plt.subplots(2, len(TITLES), figsize=(10, 8), sharey="row", gridspec_kw=heights)
    for (upper, lower), (family, title) in zip(axes.T, TITLES.items(), strict=True):
        chosen = [run for run in runs if run["family"] == family]
        draw(upper, chosen, COLOURS)
        draw_errors(lower, chosen)
        lower.set_xlim(upper.get_xlim())
        upper.set_title(f"seconds, {title}", loc="left", fontsize=10)
        lower.set_title("relative error of hutchinson, n", loc="left", fontsize=10)
    figure.tight_layout()
    figure.savefig(target, dpi=120)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, save, print the table, draw the picture."""
    run("trace_time", __doc__ or "", measure, plot, arguments)


if __name__ == "__main__":
    main()
