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

import math
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from recipes.paper.layer_timing import OPTIONS, SMOKE, Method, plain_step, plot, sweep, table
from recipes.shared.command import Options, Recipe
from recipes.shared.problem import Problem

REPEATS = 20  # draws behind the error of an estimator
CHUNK = 256  # basis vectors in one vmap, so that no Hessian is formed


def diagonal_of_hessian(problem: Problem) -> Tensor:
    """The trace ``()`` of the Hessian, formed whole."""
    hessian: Tensor = torch.func.hessian(problem.loss_of_weight)(problem.weight.detach())
    return torch.einsum("stst->", hessian)


def basis_products(problem: Problem) -> Tensor:
    """The trace ``()`` as the sum of ``<e, H e>`` over the basis."""
    weight = problem.weight.detach()
    places = torch.arange(weight.numel(), device=weight.device)
    gradient = torch.func.grad(problem.loss_of_weight)

    def curvature(index: Tensor) -> Tensor:
        direction = (places == index).to(weight.dtype).view_as(weight)
        product: Tensor = torch.func.jvp(gradient, (weight,), (direction,))[1]
        return (direction * product).sum()

    curvatures: Tensor = torch.func.vmap(curvature, chunk_size=CHUNK)(places)
    return curvatures.sum()


def exact(problem: Problem) -> Tensor:
    """The trace ``()`` from kappa_hat = ||W||^2 Tr(H)."""
    return problem.flatness(measure="layerwise") / problem.weight.detach().square().sum()


def hutchinson(probes: int) -> Callable[[Problem], Tensor]:
    """The same, estimated."""

    def trace(problem: Problem) -> Tensor:
        kappa_hat = problem.flatness(measure="layerwise", mode="hutchinson", n_samples=probes)
        return kappa_hat / problem.weight.detach().square().sum()

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


def measure(options: Options) -> list[dict[str, Any]]:
    """One row per layer and method, the estimators' with their error."""
    runs = []
    repeats = 2 if options.smoke else REPEATS
    for problem, row in sweep(METHODS, exact, options):
        if row["method"] in ESTIMATORS:
            row["error"] = relative_error(problem.copy(torch.float64), ESTIMATORS[row["method"]], repeats)
            row["error_repeats"] = repeats
        runs.append(row)
    return runs


RECIPE = Recipe("paper.trace_time", __doc__, measure, table, plot, OPTIONS, SMOKE)
main = RECIPE.main

if __name__ == "__main__":
    main()
