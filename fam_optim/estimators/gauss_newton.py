"""Computes kappa from the never negative Gauss-Newton part G of the Hessian, for several layers at once.

    G             = sum_i J_i^T S_i S_i^T J_i,    J_i = d o_i / d W
    <F F^T, T_G>  = sum_c ||F^T g_c||^2,          g_c = d<S e_c, o>/dW  (d, m), over the columns c of S

Here o_i are the network's outputs for sample i, and S_i S_i^T is the Hessian of the loss in them. One
vector-Jacobian product with a column of S gives g for all layers. Where samples do not interact, the columns
of all samples share one product, and ``||F^T g_ic||^2`` is also summed over samples. There are three modes:

exact        sums over all columns
hutchinson   uses random signs r, ``E ||F^T g_r||^2``; one backward per probe, whatever interacts
full         sums over the columns of each sample, with a product for each; for tests

``g`` is ``sum_a delta_a phi_a^T`` over the rows a of z, ``delta = d<S r, o>/dz``. Where the graph shows that
rows or samples do not interact, the sum of their squares has less variance than the square of their sum:

    of a row        ||F^T g||^2 = ||phi||^2 ||F^T delta||^2                       takes no (d, m) tensor
    of a sample     ||F^T g||^2 = sum_ab <phi_a, phi_b> <F^T delta_a, F^T delta_b>,  or from its g if cheaper

For cross-entropy kappa_GN is the expected squared gradient over labels drawn from the model.
"""

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from fam_optim.estimators.curvature import as_output
from fam_optim.estimators.hutchinson import rademacher
from fam_optim.estimators.measure import Factor
from fam_optim.graph import errors, nodes
from fam_optim.graph.corrections import corrected, corrections
from fam_optim.graph.independence import SUM, Grouping, Groups, row_uses, shown_axes
from fam_optim.graph.losses import find_outputs, pulled
from fam_optim.graph.trace import Tail, path_of
from fam_optim.layer.use import LOW_PRECISION, LinearUse, Use, describe

Pulled = tuple[dict[Use, Tensor], dict[Use, Tensor | None]]

MAX_PRODUCTS = 1024  # an evaluation that would take more vector-Jacobian products raises an error


class Jacobian:
    """Computes vector-Jacobian products from the network's outputs to the outputs z of several layers. Cost
    of a product: one backward from the loss to the lowest layer, and two more for its derivative."""

    def __init__(self, tails: Sequence[Tail], *, differentiable: bool) -> None:
        self.tails = tails if differentiable else [tail.detached() for tail in tails]
        self.differentiable = differentiable
        self.path = path_of(tails)
        self.ends = frozenset[Node]().union(*(tail.ends for tail in tails))
        self._corrections = corrections(self.path, derivatives_to_come=1) if differentiable else []
        path = self.path | self.ends
        self.outputs = find_outputs(tails[0].loss, path, self.ends, differentiable=differentiable)
        self._edges = {use: e for tail in self.tails for use, e in zip(tail.uses, tail.edges, strict=True)}
        # A backward to a lower layer forms ``delta W`` anyway where these edges are: at the inputs of Linear
        # layers on vectors, in full precision, if nothing else reads them.
        self._below: dict[Use, GradientEdge] = {}
        for use, edge in self._edges.items():
            precise = isinstance(use, LinearUse) and use.phi.dtype not in LOW_PRECISION
            phi = self._operand(edge, {"Addmm": 1, "Mm": 0}) if precise else None
            if phi is not None and phi.node in self.path:
                self._below[use] = phi

    def pull(self, r: Sequence[Tensor]) -> Pulled:
        """Returns ``delta = d<S r, o>/dz`` by use of a layer, in the shape of z, and ``delta W`` by use where
        it was formed anyway; r has the shapes of the outputs."""
        to = [*self._edges.values(), *self._below.values()]
        with corrected(self._corrections, derivatives_to_come=1):
            found = pulled(self.outputs, r, to, differentiable=self.differentiable)
        if self.differentiable:
            errors.check_functions(self.path, self.ends, [g for g in found if g is not None])
        deltas = {use: as_output(g, use) for use, g in zip(self._edges, found, strict=False)}
        return deltas, dict(zip(self._below, found[len(deltas) :], strict=True))

    def in_weight(self, use: Use, delta: Tensor) -> Tensor:
        """Returns what one use of a weight contributes to its g ``(d, m)``."""
        edge = self._edges[use]
        weight = self._operand(edge, {"Convolution": 1})
        if weight is None or nodes.results(edge.node)[0].dtype in LOW_PRECISION:  # as under autocast
            return use.pull(delta)
        # Using the forward's own node saves the convolution that `pull` would compute.
        delta = delta.reshape(nodes.shape(edge.node, edge.output_nr))  # adds the batch axis that z may lack
        (g,) = torch.autograd.grad(edge, weight, delta, create_graph=self.differentiable, retain_graph=True)
        return use.layout.matrix(g)

    def _operand(self, edge: GradientEdge, positions: Mapping[str, int]) -> GradientEdge | None:
        """Returns where an operand of the operation that makes z is made. `positions` has its place by kind
        of operation; None for other kinds, and if something else, too, reads it and passes derivatives on."""
        position = positions.get(nodes.kind(edge.node))
        node, output = (None, 0) if position is None else edge.node.next_functions[position]
        return GradientEdge(node, output) if node and len(self.tails[0].parents[node]) == 1 else None


def gauss_newton(
    tails: Sequence[Tail],
    factors: Sequence[Factor],
    mode: str,
    n_samples: int,
    generator: torch.Generator | None,
    *,
    differentiable: bool,
) -> list[Tensor]:
    """Returns ``<F F^T, T_G>`` of every layer, which is never negative. Cost for all layers together:
    hutchinson takes one vector-Jacobian product per probe. exact takes one per output of a sample, or one per
    output of the whole batch if samples interact. Raises RuntimeError if these are more than `MAX_PRODUCTS`,
    or if the loss is not known to be convex in the outputs."""
    jacobian = Jacobian(tails, differentiable=differentiable)
    tails, outputs = jacobian.tails, jacobian.outputs
    if all(0 in output.shape for output in outputs):  # no rows, or the loss is linear in outputs
        return [tail.uses[0].matrix().new_zeros(()) for tail in tails]
    shown: list[dict[int, Groups]] = [{} for _ in tails]
    if mode != "full":
        shown = shown_axes(tails, jacobian.path | jacobian.ends)
    draws: Iterator[list[Tensor]]
    if mode == "hutchinson":
        draws = ([rademacher(tuple(o.shape), o.a, generator) for o in outputs] for _ in range(n_samples))
        groupings = [_grouping(tail, list(axes)) for tail, axes in zip(tails, shown, strict=True)]
        groupings = [g if g is not None and _has_few_rows(g) else None for g in groupings]
    else:  # groups that all layers keep apart share a product
        axes, numbers = _shared(jacobian, shown)
        draws = _columns(jacobian, numbers, MAX_PRODUCTS if mode == "exact" else math.inf)
        groupings = [_grouping(tail, axes) for tail in tails]
    layers = list(zip(tails, factors, groupings, strict=True))
    squares = [[_square(jacobian, found, *layer) for layer in layers] for found in map(jacobian.pull, draws)]
    sums = [torch.stack(of_layer).sum() for of_layer in zip(*squares, strict=True)]
    return [total / n_samples for total in sums] if mode == "hutchinson" else sums


def _shared(jacobian: Jacobian, shown: Sequence[Mapping[int, Groups]]) -> tuple[list[int], list[Tensor]]:
    """Returns the axes along which all layers keep the same number of groups apart, and for every output the
    numbers of its entries, sorted by group: ``(groups, columns)``."""
    axes: list[int] = []
    groups = 1
    entries = [torch.arange(math.prod(output.shape)) for output in jacobian.outputs]
    of_entries = [torch.zeros_like(numbers) for numbers in entries]  # the group that each entry belongs to
    for axis in set.intersection(*map(set, shown)):
        lengths = {use.lead[axis] for tail in jacobian.tails for use in tail.uses}  # type: ignore[attr-defined]
        strides = [
            {shown[0][axis].strides.get((edge.node, edge.output_nr), SUM) for edge in output.edges}
            for output in jacobian.outputs
        ]
        if len(lengths) > 1 or any(len(of) > 1 or SUM in of for of in strides):
            continue
        axes.append(axis)
        (length,) = lengths
        groups *= length
        for group, numbers, (stride,) in zip(of_entries, entries, strides, strict=True):
            group.mul_(length).add_(numbers // stride % length)
    return axes, [group.argsort(stable=True).reshape(groups, -1) for group in of_entries]


def _square(
    jacobian: Jacobian, found: Pulled, tail: Tail, factor: Factor, grouping: Grouping | None
) -> Tensor:
    """Returns the sum over groups of ``||F^T g||^2`` of one layer; no grouping means one group."""
    (deltas, products), uses = found, tail.uses
    if grouping is None:
        return factor.square(torch.stack([jacobian.in_weight(use, deltas[use]) for use in uses]).sum(0))
    delta = grouping.gather_outputs([deltas[use] for use in uses])
    if grouping.size > 1:
        phi = grouping.gather([use.rows() for use in grouping.uses])
        if _has_few_rows(grouping):
            return ((phi @ phi.mT) * factor.inner(delta)).sum().clamp_min(0)
        g = delta.mT @ phi
        return factor.square(g.movedim(0, 1).flatten(1))
    product = products.get(uses[0]) if len(uses) == 1 else None
    return factor.weighted_squares(delta[:, 0], grouping.squared_norms()[:, 0], product)


def _columns(jacobian: Jacobian, numbers: Sequence[Tensor], limit: float) -> Iterator[list[Tensor]]:
    """Yields one-hot r that pick a column of S in every group at once, for one output after the other."""
    columns = sum(by_group.shape[1] for by_group in numbers)
    if columns > limit:
        raise RuntimeError(
            f"exact Gauss-Newton kappa of `layer` {describe(jacobian.tails[0].layer)} takes {columns} "
            f"vector-Jacobian products here, more than the limit of {limit}. mode='hutchinson' takes one."
        )
    for index, by_group in enumerate(numbers):
        for column in by_group.to(jacobian.outputs[index].a.device).T:
            r = [output.a.new_zeros(output.shape) for output in jacobian.outputs]
            r[index].view(-1)[column] = 1
            yield r


def _grouping(tail: Tail, axes: Sequence[int]) -> Grouping | None:
    """Returns the groups of a layer's rows along `axes`; None if there is only one group."""
    uses = row_uses(tail)
    return Grouping(uses, axes) if uses is not None and axes else None


def _has_few_rows(grouping: Grouping) -> bool:
    """Whether squares from products of rows cost at most twice as much as the square of their sum."""
    d, m, size = grouping.uses[0].d, grouping.uses[0].m, grouping.size
    return size == 1 or size * m + min(d * d + size * d, d * m + size * m) <= 2 * d * m
