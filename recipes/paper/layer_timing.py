"""Times methods on a layer of two kinds of networks, by the layer's size, for the paper's figures 4 and 5.

The two families of networks, with the measured layer ``(d, m)`` in brackets, are:

    hidden   [Linear(m, d)], Tanh, Linear(d, 10)     square, d = m
    last     Linear(32, m), Tanh, [Linear(m, 10)]    d = 10 classes

Both end in a cross-entropy on 64 random samples. Before a size is timed (float32), the answers of the methods
are compared in float64.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.table import Table
from torch import Tensor, nn

from recipes.shared import timing
from recipes.shared.command import Options, Recipe, device, positive
from recipes.shared.pictures import draw_lines, legend_above, looks, panels, tidy
from recipes.shared.problem import Problem
from recipes.shared.results import CPU
from recipes.shared.tables import pivot

BATCH, CLASSES = 64, 10
FEATURES = 32  # inputs of the "last" family
SIZES = {  # m by family
    "hidden": (4, 8, 16, 32, 64, 80, 128, 256, 512),
    "last": (2, 8, 32, 128, 400, 640, 2048, 8192, 26000),
}
TITLES = {"hidden": "hidden layer, d = m", "last": "last layer, d = 10 classes"}
QUANTITIES = {"seconds": "time of a call (s)", "error": "error of the trace (a fraction)"}
# weights; a Hessian of so many is 0.4 GB in float64, and computing it takes several times that
QUADRATIC_LIMIT = 7000
TOLERANCE = 1e-6  # of the check, relative


@dataclass(frozen=True)
class Method:
    """A function to time, and how the number to be checked follows from its result (None: it is not checked).

    A quadratic one takes time or memory by the square of the number of weights, so it is for small layers.
    """

    run: Callable[[Problem], Tensor]
    answer: Callable[[Problem, Tensor], Tensor] | None = lambda problem, result: result
    quadratic: bool = False


def build(family: str, m: int) -> Problem:
    """Builds the family's network whose measured layer has m inputs."""
    if family == "hidden":
        first = layer = nn.Linear(m, m)
        model = nn.Sequential(layer, nn.Tanh(), nn.Linear(m, CLASSES))
    else:
        first, layer = nn.Linear(FEATURES, m), nn.Linear(m, CLASSES)
        model = nn.Sequential(first, nn.Tanh(), layer)
    return Problem(model, layer, torch.randn(BATCH, first.in_features), torch.randint(CLASSES, (BATCH,)))


def plain_step(problem: Problem) -> Tensor:
    """Makes one forward and backward of the network, for comparison."""
    return problem.gradient(problem.loss())


def whole_hessian(problem: Problem) -> Tensor:
    """Returns torch.func's Hessian ``(d, m, d, m)`` of the weight, forward over reverse."""
    hessian: Tensor = torch.func.hessian(problem.loss_of_weight)(problem.weight.detach())
    return hessian


def check(problem: Problem, methods: Mapping[str, Method], expected: Callable[[Problem], Tensor]) -> None:
    """Raises RuntimeError if a method's answer differs from the expected one."""
    reference = expected(problem).item()
    for label, method in methods.items():
        if method.answer is None:
            continue
        answer = method.answer(problem, method.run(problem)).item()
        if abs(answer - reference) > TOLERANCE * abs(reference):
            shape = tuple(problem.weight.shape)
            raise RuntimeError(f"{label}, layer {shape}: expected {reference}, got {answer}")


def table(runs: Sequence[dict[str, Any]]) -> Table:
    """Makes a table of median milliseconds, with one line per layer."""
    return pivot(
        ("layer", "d x m"),
        runs,
        line=lambda run: (run["family"], f"{run['d']} x {run['m']}"),
        column=lambda run: run["method"],
        cell=lambda run: f"{1000 * run['seconds']:.3g}",
        title="Median milliseconds",
    )


def plot(results: Mapping[str, Any]) -> Figure:
    """Draws the measurements: a column per family, a row per quantity, a line per method."""
    runs = results["runs"]
    chosen = looks(run["method"] for run in runs)
    rows = [name for name in QUANTITIES if any(name in run for run in runs)]
    figure, axes = panels(len(rows), len(TITLES), 9, 0.8 + 3.2 * len(rows), sharex="col", sharey="row")
    for line, quantity in zip(axes, rows, strict=True):
        for axis, (family, title) in zip(line, TITLES.items(), strict=True):
            own = [run for run in runs if run["family"] == family and quantity in run]
            draw_lines(axis, own, "weights", quantity, "method", chosen)
            axis.set(xlabel="weights of the layer (number)", ylabel=QUANTITIES[quantity])
            tidy(axis, title, log="xy")
    legend_above(figure, axes[0, 0], 4)
    return figure


def timing_recipe(
    name: str,
    doc: str | None,
    methods: Mapping[str, Method],
    expected: Callable[[Problem], Tensor],
    also: Callable[[str, Problem, Options], dict[str, Any]] = lambda method, problem, options: {},
    tables: Callable[[Sequence[dict[str, Any]]], Table | list[Table]] = table,
) -> Recipe:
    """Returns a recipe that checks and times every size; ``also`` adds measurements of a method."""

    def rows(options: Options) -> Iterator[dict[str, Any]]:
        count = 3 if options.smoke else None
        for family, m in ((family, m) for family, sizes in SIZES.items() for m in sizes[:count]):
            problem = build(family, m).copy(device=options.device)
            d, weights = len(problem.weight), problem.weight.numel()
            small = weights <= QUADRATIC_LIMIT
            chosen = {label: one for label, one in methods.items() if small or not one.quadratic}
            check(problem.copy(torch.float64), chosen, expected)
            calls = {label: partial(method.run, problem) for label, method in chosen.items()}
            for label, seconds in timing.alternate(calls, options.rounds, options.device).items():
                middle, quartiles = timing.median(seconds)
                row = {
                    "family": family,
                    "d": d,
                    "m": m,
                    "weights": weights,
                    "method": label,
                    "seconds": middle,
                }
                row |= {"quartiles": quartiles, "calls": len(seconds)}
                yield row | also(label, problem, options)

    settings: dict[str, dict[str, Any]] = {
        "--rounds": {
            "type": positive,
            "default": 15,
            "help": "timed calls of every method and size (default: 15)",
        },
        "--device": {"type": device, "default": CPU, "help": "cpu (default), cuda, ..."},
    }
    return Recipe(name, doc, rows, tables, plot, settings, {"rounds": 3})
