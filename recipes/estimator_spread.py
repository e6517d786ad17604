"""The spread of Hutchinson's estimator: standard deviation of single probes, for kappa and its gradient.

    python -m recipes.estimator_spread              # table and JSON in runs/estimator_spread
    python -m recipes.estimator_spread --smoke

Compared, all unbiased and at one Hessian-vector product per probe:

    weight   V = F Z with signs Z (k, m), in weight space; what a bare parameter or a convolution gets
    row      ||phi_a|| F s_a with signs of its own for every row a, in output space; what a Linear
             layer gets where its rows do not interact

The standard deviation of the value is relative to kappa, that of the gradient (in all parameters) is the
root mean square distance from the exact gradient, relative to its norm. Both before training and after.
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fam_optim import Observation, observe, relative_flatness
from recipes.datasets import fashion_mnist
from recipes.results import environment, save

WIDTH = 64
BATCH = 128
"""The network: Linear(784, 64), Tanh, Linear(64, 64), Tanh, Linear(64, 10)."""
LAYERS = {"hidden 64x64": 2, "head 10x64": 4}
Estimate = Callable[[Tensor, Observation, nn.Linear, torch.Generator], Tensor]


def row(loss: Tensor, layer: Observation, module: nn.Linear, generator: torch.Generator) -> Tensor:
    """The library's probe of an observed layer."""
    return relative_flatness(loss, layer, mode="hutchinson", generator=generator)


def weight(loss: Tensor, layer: Observation, module: nn.Linear, generator: torch.Generator) -> Tensor:
    """The library's probe of a bare parameter."""
    parameter = module.weight
    assert isinstance(parameter, nn.Parameter)
    return relative_flatness(loss, parameter, mode="hutchinson", generator=generator)


ESTIMATORS: dict[str, Estimate] = {"weight": weight, "row": row}


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


def spread(model: nn.Sequential, index: int, x: Tensor, y: Tensor, probes: int, seed: int) -> dict[str, Any]:
    """Relative standard deviations of single probes, and the time of one with its gradient."""
    module = model[index]
    assert isinstance(module, nn.Linear)
    with observe(module) as layer:
        loss = cross_entropy(model(x), y)
    exact = relative_flatness(loss, layer)
    exact_gradient = gradient(exact, model)
    measured: dict[str, Any] = {"kappa": exact.item()}
    for name, estimate in ESTIMATORS.items():
        generator = torch.Generator().manual_seed(seed)
        values, distances, seconds = [], [], []
        for _ in range(probes):
            begin = time.perf_counter()
            value = estimate(loss, layer, module, generator)
            by_parameters = gradient(value, model)
            seconds.append(time.perf_counter() - begin)
            values.append(value.item())
            distances.append((by_parameters - exact_gradient).square().sum().item())
        scale = abs(exact.item())
        measured[name] = {
            "value": statistics.stdev(values) / scale,
            "bias_in_standard_errors": (statistics.fmean(values) - exact.item())
            / (statistics.stdev(values) / math.sqrt(probes)),
            "gradient": math.sqrt(statistics.fmean(distances)) / exact_gradient.norm().item(),
            "milliseconds": 1000 * statistics.median(seconds),
        }
    return measured


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(
        prog="python -m recipes.estimator_spread", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--probes", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=300, help="of training, for the trained network")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/estimator_spread"))
    parser.add_argument("--smoke", action="store_true", help="few probes and steps: a test, no result")
    options = parser.parse_args(arguments)
    if options.smoke:
        options.probes, options.steps = 10, 3
    torch.manual_seed(options.seed)
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
            measured = spread(model, index, *batches[0], options.probes, options.seed)
            runs.append({"stage": stage, "layer": name, **measured})
    save(
        options.out / "estimator_spread.json",
        {"probes": options.probes, "environment": environment(torch.device("cpu")), "runs": runs},
    )
    show(runs, Console())


def show(runs: Sequence[dict[str, Any]], console: Console) -> None:
    """One line per network stage, layer and estimator."""
    table = Table(title="relative standard deviation of one probe", box=box.SIMPLE)
    for column in ("network", "layer", "probe"):
        table.add_column(column)
    for column in ("kappa", "gradient", "ms per probe"):
        table.add_column(column, justify="right")
    for run in runs:
        for name in ESTIMATORS:
            m = run[name]
            table.add_row(
                run["stage"],
                run["layer"],
                name,
                f"{m['value']:.3f}",
                f"{m['gradient']:.3f}",
                f"{m['milliseconds']:.2f}",
            )
    console.print(table)


if __name__ == "__main__":
    main()
