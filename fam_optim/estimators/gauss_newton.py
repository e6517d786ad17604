"""Gauss-Newton curvature: the part of the Hessian that is never negative, for several layers at once.

    G             = sum_i J_i^T S_i S_i^T J_i,    J_i = d o_i / d W
    <F F^T, T_G>  = sum_c ||F^T g_c||^2,          g_c = d<S e_c, o>/dW  (d, m), over the columns c of S

One vector-Jacobian product with a column gives its g for all layers. Where samples do not interact, the
columns of all samples share a product, and the sum of ``||F^T g_ic||^2`` is over samples too.

exact        all columns
hutchinson   random signs r for the columns: ``E ||F^T g_r||^2``, one backward, whatever interacts
full         T_G from every column by itself: for tests

``g`` is ``sum_a delta_a phi_a^T`` over the rows a of z, ``delta = d<S r, o>/dz``. Where the graph shows that
rows do not interact, or samples, the sum of their squares has less variance than the square of their sum:

    of a row        ||F^T g||^2 = ||phi||^2 ||F^T delta||^2                       takes no (d, m) tensor
    of a sample     ||F^T g||^2 = sum_ab <phi_a, phi_b> <F^T delta_a, F^T delta_b>,  or from its g if cheaper

Source: DESIGN, 7; for cross-entropy the expected squared gradient over labels drawn from the model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fam_optim.estimators.hutchinson import rademacher
from fam_optim.estimators.jacobian import Jacobian, Pulled
from fam_optim.estimators.rows import Grouping, in_order, row_uses
from fam_optim.graph import independence
from fam_optim.layer.use import describe

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from fam_optim.estimators.measure import Factor
    from fam_optim.graph.trace import Tail

MAX_PRODUCTS = 1024
"""More vector-Jacobian products than this in one evaluation end in an error instead."""


def gauss_newton(
    tails: Sequence[Tail],
    factors: Sequence[Factor],
    mode: str,
    *,
    differentiable: bool,
    n_samples: int,
    generator: torch.Generator | None,
) -> list[Tensor]:
    """``<F F^T, T_G>`` of every layer, never negative.

    Cost: for all layers together one vector-Jacobian product per probe (hutchinson), or per output of a
    sample where samples do not interact, else per output of the batch (exact).

    Raises:
        RuntimeError: if the loss is not known to be convex in the outputs; in mode exact, if it would take
            more than `MAX_PRODUCTS` products.
    """
    jacobian = Jacobian(tails, differentiable=differentiable)
    if not jacobian.outputs:  # a loss linear in what the network puts out
        return [use.matrix().new_zeros(()) for use, *_ in jacobian.uses]
    if mode == "full":
        return _from_traces(jacobian, factors)
    apart = _independent_groups(jacobian)
    groups = apart[0].groups if apart[0] else 1
    if mode == "exact":
        columns = sum(jacobian.sizes) // groups
        if columns > MAX_PRODUCTS:
            raise RuntimeError(
                f"exact Gauss-Newton kappa of `layer` {describe(tails[0].layer)} takes {columns} "
                f"vector-Jacobian products here, more than the limit of {MAX_PRODUCTS}. Use "
                "mode='hutchinson', which is unbiased with one."
            )
        values = [_squares(jacobian, factors, apart, r) for r in _columns(jacobian, groups)]
        return [torch.stack(of_layer).sum() for of_layer in zip(*values, strict=True)]
    like = jacobian.uses[0][0].matrix()
    cheap = [grouping if grouping and _is_cheap(grouping) else None for grouping in apart]
    samples = []
    for _ in range(n_samples):
        r = [rademacher(tuple(output.shape), like, generator) for output in jacobian.outputs]
        samples.append(_squares(jacobian, factors, cheap, r))
    return [torch.stack(of_layer).mean() for of_layer in zip(*samples, strict=True)]


def _squares(
    jacobian: Jacobian,
    factors: Sequence[Factor],
    groupings: Sequence[Grouping | None],
    r: Sequence[Tensor],
) -> list[Tensor]:
    """``sum over groups of ||F^T g||^2`` of every layer, for one r; without a grouping there is one group."""
    of_layers = zip(jacobian.pull(r), factors, groupings, strict=True)
    return [_square(jacobian, layer, *of_layer) for layer, of_layer in enumerate(of_layers)]


def _square(
    jacobian: Jacobian, layer: int, found: Sequence[Pulled], factor: Factor, grouping: Grouping | None
) -> Tensor:
    """The same of one layer, by position."""
    if grouping is None:
        return factor.square(jacobian.in_weights(layer, found))
    delta = grouping.gather_outputs([f.delta for f in found])
    if grouping.size > 1:
        phi = grouping.gather([use.rows() for use in grouping.uses])
        if _by_weights(grouping) < _by_rows(grouping):
            g = delta.mT @ phi
            return factor.square(g.movedim(0, 1).flatten(1))
        return ((phi @ phi.mT) * factor.inner(delta)).sum().clamp_min(0)
    rows = [
        f.through.reshape(*use.lead, -1)
        for f, use in zip(found, grouping.uses, strict=True)
        if f.through is not None
    ]
    product = grouping.gather(rows) if len(rows) == len(found) else None
    scale, pulled = factor.pulled(delta, product)
    return scale * (grouping.squared_norms()[:, 0] * pulled[:, 0].square().sum(1)).sum()


def _columns(jacobian: Jacobian, groups: int) -> Iterator[list[Tensor]]:
    """One-hot vectors, the same for every group: all columns of S, that of one output after the other."""
    like = jacobian.uses[0][0].matrix()
    for index, size in enumerate(jacobian.sizes):
        for column in range(size // groups):
            r = [like.new_zeros(other.shape) for other in jacobian.outputs]
            r[index].view(groups, -1)[:, column] = 1
            yield r


def _from_traces(jacobian: Jacobian, factors: Sequence[Factor]) -> list[Tensor]:
    """``<F F^T, T>`` with T from every column of S by itself."""
    traces: list[Any] = [0.0] * len(factors)
    for r in _columns(jacobian, 1):
        for layer, found in enumerate(jacobian.pull(r)):
            g = jacobian.in_weights(layer, found)
            traces[layer] = traces[layer] + g @ g.T
    return [(factor.gram() * t).sum().clamp_min(0) for factor, t in zip(factors, traces, strict=True)]


def _independent_groups(jacobian: Jacobian) -> Sequence[Grouping | None]:
    """The finest groups of every layer's rows, for all layers as many, that the graph shows not to interact
    on the way to the loss; None for every layer if there are none."""
    none = [None] * len(jacobian.tails)
    by_layer = []
    for tail, uses in zip(jacobian.tails, jacobian.uses, strict=True):
        of_rows = row_uses(tail, uses)
        if of_rows is None:
            return none
        finest_last = reversed([Grouping(of_rows, axis) for axis in _axes(of_rows)])
        by_layer.append({grouping.groups: grouping for grouping in finest_last})
    for groups in sorted(set.intersection(*map(set, by_layer)) - {1}, reverse=True):
        whole = all(size % groups == 0 for size in jacobian.sizes)
        if whole and independence.independent(jacobian.path, jacobian.ends, groups):
            return [groupings[groups] for groupings in by_layer]
    return none


def _is_cheap(grouping: Grouping) -> bool:
    """Whether the groups' squares by themselves, which vary less, take at most twice the multiplications that
    the square of their sum takes."""
    return grouping.size == 1 or _by_rows(grouping) <= 2 * grouping.uses[0].d * grouping.uses[0].m


def _by_rows(grouping: Grouping) -> float:
    """Multiplications, for each row, of the groups' squares from the products of their rows."""
    d, m, size = grouping.uses[0].d, grouping.uses[0].m, grouping.size
    return size * m + min(d * d + size * d, d * m + size * m)


def _by_weights(grouping: Grouping) -> float:
    """The same from every group's g, ``(d, m)``."""
    d, m, size = grouping.uses[0].d, grouping.uses[0].m, grouping.size
    return d * m + d * m * min(d, m) / size


def _axes(uses: Sequence[Any]) -> list[int | str]:
    """What groups may lie along, the finest first: rows, or samples."""
    axes: list[int | str] = ["row", 0] if all(use.lead for use in uses) else ["row"]
    same = len({use.lead[:1] for use in uses}) == 1
    return [a for a in axes if in_order(uses, a) and (a == "row" or same)]
