"""Measures the time of the Hessian of one layer's weights by the layer's size (figure 4 of the paper).

It compares these, on the networks of recipes.paper.layer_timing, forward included:

    autograd loop         one backward per entry of the gradient
    vectorised autograd   torch.autograd.functional.hessian(vectorize=True)
    torch.func            torch.func.hessian
    exact kappa           relative_flatness(mode="exact"), which forms no Hessian
    exact, gradient       the gradient of loss + kappa in all parameters, which FAM's penalty needs
    plain step            forward and backward of the network
"""

from typing import Any

import torch
from torch import Tensor

from recipes.paper.comparison import figure_4
from recipes.paper.layer_timing import Method, plain_step, table, timing_recipe, whole_hessian
from recipes.shared.problem import Problem


def autograd_loop(problem: Problem) -> Tensor:
    """Returns the Hessian ``(d, m, d, m)``, computed row by row."""
    weight = problem.weight
    gradient = torch.autograd.grad(problem.loss(), weight, create_graph=True)[0].flatten()
    # Not "for entry in gradient": the backward of that would stack all entries again, for every row.
    entries = (gradient[index] for index in range(len(gradient)))
    rows = [torch.autograd.grad(entry, weight, retain_graph=True)[0] for entry in entries]
    return torch.stack(rows).view(*weight.shape, *weight.shape)


def vectorised_autograd(problem: Problem) -> Any:
    """Returns the Hessian ``(d, m, d, m)``, all rows computed in one batched backward."""
    hessian: Any = torch.autograd.functional.hessian
    return hessian(problem.loss_of_weight, problem.weight.detach(), vectorize=True)


def exact_gradient(problem: Problem) -> Tensor:
    """Computes the gradient of the penalised loss, and returns kappa, ``()``."""
    loss, kappa = problem.penalised()
    problem.gradient(loss + kappa)
    return kappa


def kappa_of(problem: Problem, hessian: Tensor) -> Tensor:
    """Returns ``<W W^T, T>`` with ``T[s, u] = Tr(H_{s,u})``, ``()``."""
    weight = problem.weight
    return (weight @ weight.T * torch.einsum("stut->su", hessian)).sum()


METHODS = {
    "plain step": Method(plain_step, answer=None),
    "exact kappa": Method(Problem.flatness),
    "exact, gradient": Method(exact_gradient),
    "autograd loop": Method(autograd_loop, kappa_of, quadratic=True),
    "vectorised autograd": Method(vectorised_autograd, kappa_of, quadratic=True),
    "torch.func": Method(whole_hessian, kappa_of, quadratic=True),
}

main = timing_recipe(
    *("paper.hessian_time", __doc__, METHODS, Problem.flatness),
    tables=lambda runs: [table(runs), figure_4(runs)],  # the paper's factors beside the measured ones
).main

if __name__ == "__main__":
    main()
