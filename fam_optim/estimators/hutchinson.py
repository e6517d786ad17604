"""Hutchinson's estimator: ``E[<V, H V>] = <F F^T, T>`` for ``V = F Z`` with random signs Z ``(k, m)``.

F is not held constant, so the gradient of the estimate is unbiased for all of Lemma 1. H V is one
Hessian-vector product through the tail. (The paper, section 4, uses it for the layerwise measure.)

In weight space it is enough that any two signs of Z are uncorrelated. So for F = W, ``Z[k,t] = s_k r_{t-k}``
makes V a circular convolution, which takes ``d m log m`` operations, not ``d m^2``, and no (m, m) tensor.

Where the graph shows that the rows of z do not interact, T is a sum over rows of ``||phi_a||^2 Hess_{z_a}``.
Then every row gets its own signs, ``sum_a ||phi_a||^2 <F s_a, Hess_{z_a} F s_a>``. This takes the same single
product, makes the trace over m exact, and has about half the standard deviation.
"""

from functools import partial

import torch
from torch import Tensor

from fam_optim.estimators.curvature import Curvature
from fam_optim.estimators.measure import Factor, doubled
from fam_optim.graph.independence import find_grouping


def rademacher(shape: tuple[int, ...], like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Returns independent random signs in the dtype and on the device of `like`."""
    device = like.device if generator is None else generator.device
    bits = torch.randint(0, 2, shape, generator=generator, device=device, dtype=torch.int8)
    return (2 * bits - 1).to(device=like.device, dtype=like.dtype)


def hutchinson(
    curvature: Curvature, factor: Factor, n_samples: int, generator: torch.Generator | None
) -> Tensor:
    """Returns the mean of `n_samples` probes, each of which takes one Hessian-vector product."""
    draw = partial(rademacher, like=curvature.gradient[0], generator=generator)
    rows = find_grouping(curvature.tail)
    values = []
    for _ in range(n_samples):
        if rows is None or rows.size > 1:
            values.append(curvature.quadratic(factor.weight_probe(draw)))
        else:  # sum_a ||phi_a||^2 <v_a, Hess_{z_a} v_a>, with one random v_a per row
            probe = factor.probe(draw((rows.groups, factor.columns)))
            moved = rows.gather_outputs(curvature.hvp(rows.scatter(probe.detach()[:, None])))
            by_row = (doubled(probe) * moved[:, 0]).sum(1)  # as in Curvature.quadratic
            values.append((rows.squared_norms()[:, 0] * by_row).sum())
    return torch.stack(values).mean()
