"""The time of the Hessian of one layer's weights by the layer's size (figure 4 of the paper).

    python -m recipes.paper.hessian_time                       # table, JSON and picture in runs/hessian_time
    python -m recipes.paper.hessian_time --smoke
    python -m recipes.paper.hessian_time --plot results.json   # redraw

Compared, on the networks of recipes.paper.layer_timing, forward included:

    autograd loop         one backward per entry of the gradient
    vectorised autograd   torch.autograd.functional.hessian(vectorize=True)
    torch.func            torch.func.hessian, forward over reverse
    exact kappa           relative_flatness(mode="exact"), which forms no Hessian
    exact, gradient       the gradient of loss + kappa in all parameters, what FAM's step computes
    plain step            forward and backward of the network

Before a size is timed (float32), kappa of each Hessian is compared with relative_flatness in float64.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from torch import Tensor

from fam_optim import observe, relative_flatness
from recipes.paper.layer_timing import Method, Problem, draw, plain_step, run, sweep
from recipes.shared.results import load

COLOURS = {
    "autograd loop": "#0072b2",
    "vectorised autograd": "#56b4e9",
    "torch.func": "#009e73",
    "exact, gradient": "#d1495b",
    "exact kappa": "#e69f00",
    "plain step": "#555555",
}
TITLES = {"hidden": "hidden layer, d = m", "last": "last layer, d = 10 classes"}


def autograd_loop(problem: Problem) -> Tensor:
    """The Hessian ``(d, m, d, m)``, row by row."""
    weight = problem.layer.weight
    gradient = torch.autograd.grad(problem.loss(), weight, create_graph=True)[0].flatten()
    # Not "for entry in gradient": the backward of that would stack all entries again, for every row.
    entries = (gradient[index] for index in range(len(gradient)))
    rows = [torch.autograd.grad(entry, weight, retain_graph=True)[0] for entry in entries]
    return torch.stack(rows).view(*weight.shape, *weight.shape)


def vectorised_autograd(problem: Problem) -> Tensor:
    """The Hessian ``(d, m, d, m)``, all rows in one batched backward."""
    hessian: Tensor = torch.autograd.functional.hessian(  # type: ignore[no-untyped-call]
        problem.loss_of_weight, problem.layer.weight.detach(), vectorize=True
    )
    return hessian


def torch_func(problem: Problem) -> Tensor:
    """The Hessian ``(d, m, d, m)``, forward over reverse."""
    hessian: Tensor = torch.func.hessian(problem.loss_of_weight)(problem.layer.weight.detach())
    return hessian


def exact_gradient(problem: Problem) -> Tensor:
    """kappa, ``()``, after the gradient of the penalised loss."""
    with observe(problem.layer) as layer:
        loss = problem.loss()
    kappa = relative_flatness(loss, layer)
    torch.autograd.grad(loss + kappa, list(problem.model.parameters()))
    return kappa


def kappa_of(problem: Problem, hessian: Tensor) -> Tensor:
    """``<W W^T, T>`` with ``T[s, u] = Tr(H_{s,u})``, ``()``."""
    weight = problem.layer.weight
    return (weight @ weight.T * torch.einsum("stut->su", hessian)).sum()


METHODS = {
    "plain step": Method(plain_step, answer=None),
    "exact kappa": Method(Problem.flatness),
    "exact, gradient": Method(exact_gradient),
    "autograd loop": Method(autograd_loop, kappa_of, quadratic=True),
    "vectorised autograd": Method(vectorised_autograd, kappa_of, quadratic=True),
    "torch.func": Method(torch_func, kappa_of, quadratic=True),
}


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per layer and method."""
    return [row for _, row in sweep(METHODS, Problem.flatness, options)]


def plot(source: Path, target: Path) -> None:
    """Draw one panel per family: seconds by number of weights, a line per method."""
    runs = load(source)["runs"]
    figure, axes = plt.subplots(1, len(TITLES), figsize=(10, 4.6), sharex=True, sharey=True)
    for axis, (family, title) in zip(axes, TITLES.items(), strict=True):
        draw(axis, [run for run in runs if run["family"] == family], COLOURS)
        axis.set_title(f"seconds, {title}", loc="left", fontsize=10)
    figure.tight_layout()
    figure.savefig(target, dpi=120)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, save, print the table, draw the picture."""
    run("hessian_time", __doc__ or "", measure, plot, arguments)


if __name__ == "__main__":
    main()
