"""Measures the time of the trace of one layer's Hessian, and an estimate's error (figure 5 of the paper).

It compares these, on the networks of recipes.paper.layer_timing, forward included:

    torch.func, Hessian    torch.func.hessian, then its diagonal
    torch.func, products   a Hessian-vector product (jvp of grad) per basis vector, vmapped in chunks
    exact                  relative_flatness(measure="layerwise") / ||W||^2
    hutchinson, n          the same with mode="hutchinson" and n probes
    plain step             forward and backward of the network

The error of an estimate is the root mean square of |estimate - exact| / |exact| over repeated draws.
"""

import math
import statistics
from functools import partial
from typing import Any

import torch
from torch import Tensor

from recipes.paper.layer_timing import Method, plain_step, timing_recipe, whole_hessian
from recipes.shared.command import Options
from recipes.shared.problem import Problem

REPEATS = 20  # draws behind the error of an estimator
CHUNK = 256  # basis vectors in one vmap, so that no Hessian is formed


def basis_products(problem: Problem) -> Tensor:
    """Returns the trace ``()`` as the sum of ``<e, H e>`` over all basis vectors e."""
    weight = problem.weight.detach()
    places = torch.arange(weight.numel(), device=weight.device)
    gradient = torch.func.grad(problem.loss_of_weight)

    def curvature(index: Tensor) -> Any:
        direction = (places == index).to(weight.dtype).view_as(weight)
        return (direction * torch.func.jvp(gradient, (weight,), (direction,))[1]).sum()

    curvatures: Tensor = torch.func.vmap(curvature, chunk_size=CHUNK)(places)
    return curvatures.sum()


def trace(problem: Problem, **options: Any) -> Tensor:
    """Returns the trace ``()`` from kappa_hat = ||W||^2 Tr(H), in the library's exact mode or another."""
    return problem.flatness(measure="layerwise", **options) / problem.weight.detach().square().sum()


ESTIMATORS = {
    f"hutchinson, {probes}": Method(partial(trace, mode="hutchinson", n_samples=probes), answer=None)
    for probes in (1, 10, 100)
}
METHODS = {
    "plain step": Method(plain_step, answer=None),
    "exact": Method(trace),
    **ESTIMATORS,
    "torch.func, products": Method(basis_products, quadratic=True),
    "torch.func, Hessian": Method(lambda p: torch.einsum("stst->", whole_hessian(p)), quadratic=True),
}


def relative_error(label: str, problem: Problem, options: Options) -> dict[str, Any]:
    """Returns an estimator's root mean square error relative to the trace; nothing for another method."""
    if label not in ESTIMATORS:
        return {}
    repeats, problem = 2 if options.smoke else REPEATS, problem.copy(torch.float64)
    run, exact = ESTIMATORS[label].run, trace(problem).item()
    squares = [(run(problem).item() / exact - 1) ** 2 for _ in range(repeats)]
    return {"error": math.sqrt(statistics.fmean(squares)), "error_repeats": repeats}


main = timing_recipe("paper.trace_time", __doc__, METHODS, trace, relative_error).main

if __name__ == "__main__":
    main()
