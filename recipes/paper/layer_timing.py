"""Shared by hessian_time and trace_time: networks by size, a check, alternating timings.

Two families of networks, the measured layer ``(d, m)`` in brackets:

    hidden   [Linear(m, d)], Tanh, Linear(d, 10)     square, d = m
    last     Linear(32, m), Tanh, [Linear(m, 10)]    d = 10 classes

Both end in a cross-entropy on a batch of 64 random samples with random labels.
"""

import argparse
import copy
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # draws to files, needs no display

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.ticker import NullFormatter
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from fam_optim import observe, relative_flatness
from recipes.shared.results import load, record, save

BATCH = 64
CLASSES = 10
FEATURES = 32  # what the body of the "last" family sees
SIZES = {
    "hidden": (4, 8, 16, 32, 64, 80, 128, 256, 512),
    "last": (2, 8, 32, 128, 400, 640, 2048, 8192, 26000),
}
"""m by family."""
QUADRATIC_LIMIT = (
    7000  # weights: a Hessian is 0.4 GB in float64 there, its computation takes several times that
)
TOLERANCE = 1e-6  # of the check, relative
FITTED = 3  # the largest sizes, to which the slope is fitted


@dataclass(frozen=True)
class Problem:
    """A network with the layer that is measured, and a batch: inputs ``(N, features)``, targets ``(N,)``."""

    family: str
    model: nn.Sequential
    layer: nn.Linear
    inputs: Tensor
    targets: Tensor

    def double(self) -> "Problem":
        """A copy in float64."""
        twin = copy.deepcopy(self)
        twin.model.double()
        return replace(twin, inputs=twin.inputs.double())

    def loss(self) -> Tensor:
        """The loss of the batch, ``()``."""
        return cross_entropy(self.model(self.inputs), self.targets)

    def loss_of_weight(self, weight: Tensor) -> Tensor:
        """The loss as a function of the layer's weight ``(d, m)`` alone: nothing else asks for a graph."""
        constants = {name: parameter.detach() for name, parameter in self.model.named_parameters()}
        replaced = f"{list(self.model).index(self.layer)}.weight"
        logits = functional_call(self.model, {**constants, replaced: weight}, (self.inputs,))
        return cross_entropy(logits, self.targets)

    def flatness(self, **options: Any) -> Tensor:
        """The library's kappa, forward included, ``()``."""
        with observe(self.layer) as layer:
            loss = self.loss()
        return relative_flatness(loss, layer, **options)


@dataclass(frozen=True)
class Method:
    """What is timed, and how the number to be checked follows from its result (None: not checked).

    A quadratic one takes time or memory by the square of the number of weights: for small layers only.
    """

    run: Callable[[Problem], Tensor]
    answer: Callable[[Problem, Tensor], Tensor] | None = lambda problem, result: result
    quadratic: bool = False


def build(family: str, m: int) -> Problem:
    """The family's network with m inputs of the layer."""
    if family == "hidden":
        layer = nn.Linear(m, m)
        model = nn.Sequential(layer, nn.Tanh(), nn.Linear(m, CLASSES))
    else:
        layer = nn.Linear(m, CLASSES)
        model = nn.Sequential(nn.Linear(FEATURES, m), nn.Tanh(), layer)
    first = model[0]
    assert isinstance(first, nn.Linear)
    inputs, targets = torch.randn(BATCH, first.in_features), torch.randint(CLASSES, (BATCH,))
    return Problem(family, model, layer, inputs, targets)


def plain_step(problem: Problem) -> Tensor:
    """One forward and backward of the network, for comparison."""
    loss = problem.loss()
    torch.autograd.grad(loss, list(problem.model.parameters()))
    return loss


def sweep(
    methods: Mapping[str, Method], expected: Callable[[Problem], Tensor], options: argparse.Namespace
) -> Iterator[tuple[Problem, dict[str, Any]]]:
    """Every size of both families: check, then time. Yields the problem and one row per method.

    A quadratic method is left out of large layers, and any beyond the size where it took over the limit.
    """
    for family, sizes in SIZES.items():
        slow: set[str] = set()
        for m in sizes[:3] if options.smoke else sizes:
            problem = build(family, m)
            weights = problem.layer.weight.numel()
            chosen = {
                label: method
                for label, method in methods.items()
                if label not in slow and (weights <= QUADRATIC_LIMIT or not method.quadratic)
            }
            check(problem.double(), chosen, expected)
            for label, seconds in alternate(problem, chosen, options.rounds, options.limit).items():
                low, middle, high = np.quantile(seconds, (0.25, 0.5, 0.75)).tolist()
                if middle > options.limit:
                    slow.add(label)
                size = {"family": family, "d": problem.layer.out_features, "m": m, "weights": weights}
                times = {"seconds": middle, "quartiles": [low, high], "calls": len(seconds)}
                yield problem, {**size, "method": label, **times}


def check(problem: Problem, methods: Mapping[str, Method], expected: Callable[[Problem], Tensor]) -> None:
    """Raise if a method's answer is another than the expected one."""
    reference = expected(problem).item()
    for label, method in methods.items():
        if method.answer is None:
            continue
        answer = method.answer(problem, method.run(problem)).item()
        if abs(answer - reference) > TOLERANCE * abs(reference):
            raise RuntimeError(
                f"{label}, {problem.family} layer {tuple(problem.layer.weight.shape)}: expected {reference}, "
                f"got {answer}"
            )


def alternate(
    problem: Problem, methods: Mapping[str, Method], rounds: int, limit: float
) -> dict[str, list[float]]:
    """Seconds of every call, the methods in alternation, in an order that rotates.

    A first call of each warms up (the library remembers what it verified of a graph, as in training); one
    that takes over the limit is not repeated.
    """
    first = {label: timed(method, problem) for label, method in methods.items()}
    seconds = {label: [first[label]] if first[label] > limit else [] for label in methods}
    order = deque(label for label in methods if first[label] <= limit)
    for _ in range(rounds):
        for label in order:
            seconds[label].append(timed(methods[label], problem))
        order.rotate(-1)
    return seconds


def timed(method: Method, problem: Problem) -> float:
    """Seconds of one call."""
    begin = time.perf_counter()
    method.run(problem)
    return time.perf_counter() - begin


def run(
    name: str,
    description: str,
    measure: Callable[[argparse.Namespace], list[dict[str, Any]]],
    plot: Callable[[Path, Path], None],
    arguments: Sequence[str] | None,
) -> None:
    """The command of either recipe: measure, save, print the table, draw the picture."""
    options = parse(name, description, arguments)
    if options.plot:
        plot(options.plot, options.plot.with_suffix(".png"))
        return
    torch.manual_seed(options.seed)
    torch.set_num_threads(options.threads)
    begin = time.perf_counter()
    runs = measure(options)
    path = options.out / f"{name}.json"
    chosen = {key: value for key, value in vars(options).items() if key not in ("out", "plot")}
    configuration = {"batch": BATCH, "tolerance": TOLERANCE, **chosen}
    save(path, record(name, configuration, time.perf_counter() - begin, runs))
    Console(width=160).print("milliseconds", table(load(path)["runs"]), sep="\n")
    plot(path, path.with_suffix(".png"))


def parse(name: str, description: str, arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line of either recipe."""
    parser = argparse.ArgumentParser(
        prog=f"python -m recipes.paper.{name}", description=description.split("\n")[0]
    )
    parser.add_argument("--rounds", type=int, default=15, help="timed calls of every method and size")
    parser.add_argument("--limit", type=float, default=20, help="seconds; slower methods end at that size")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs") / name)
    parser.add_argument("--plot", type=Path, metavar="JSON", help="redraw the picture of these results only")
    parser.add_argument(
        "--smoke", action="store_true", help="the smallest sizes, three rounds: a test, no result"
    )
    options = parser.parse_args(arguments)
    if options.smoke:
        options.rounds = 3
    return options


def table(runs: Sequence[Mapping[str, Any]]) -> Table:
    """Median milliseconds, one line per layer."""
    labels = list(dict.fromkeys(run["method"] for run in runs))
    result = Table("layer", "d x m", *labels, box=box.MARKDOWN)
    for family, d, m in dict.fromkeys((run["family"], run["d"], run["m"]) for run in runs):
        times = {
            run["method"]: f"{1000 * run['seconds']:.3g}"
            for run in runs
            if (run["family"], run["d"], run["m"]) == (family, d, m)
        }
        result.add_row(family, f"{d} x {m}", *(times.get(label, "-") for label in labels))
    return result


def draw(axis: Axes, runs: Sequence[Mapping[str, Any]], colours: Mapping[str, str]) -> None:
    """Draw seconds by number of weights: medians as lines, quartiles as bands, slopes in the legend."""
    for method, colour in colours.items():
        chosen = [run for run in runs if run["method"] == method]
        if not chosen:
            continue
        weights, seconds = [run["weights"] for run in chosen], [run["seconds"] for run in chosen]
        low, high = zip(*(run["quartiles"] for run in chosen), strict=True)
        style = ":" if method == "plain step" else "-"
        label = f"{method} ({slope(weights, seconds):.1f})"
        axis.plot(weights, seconds, style, color=colour, linewidth=1.8, marker="o", markersize=3, label=label)
        axis.fill_between(weights, low, high, color=colour, alpha=0.15, linewidth=0)
    tidy(axis)
    axis.legend(
        loc="upper left",
        bbox_to_anchor=(0, -0.18),
        ncols=2,
        frameon=False,
        fontsize=8,
        title=f"method (slope of its {FITTED} largest sizes)",
        title_fontsize=8,
        alignment="left",
    )


def slope(weights: Sequence[int], seconds: Sequence[float]) -> float:
    """The exponent p of ``seconds = c weights^p``, by least squares on the largest sizes."""
    return float(np.polyfit(np.log(weights[-FITTED:]), np.log(seconds[-FITTED:]), 1)[0])


def tidy(axis: Axes) -> None:
    """Logarithmic axes without a box, labelled at powers of ten."""
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.yaxis.set_minor_formatter(NullFormatter())
    axis.set_xlabel("weights of the layer")
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
