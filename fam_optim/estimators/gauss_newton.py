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

For cross-entropy it is the expected squared gradient over labels drawn from the model.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from fam_optim.estimators.hutchinson import rademacher
from fam_optim.graph import errors, nodes
from fam_optim.graph.corrections import corrected, corrections
from fam_optim.graph.independence import SUM, Grouping, row_uses, shown_axes
from fam_optim.graph.losses import cotangents, find_outputs, without_scale
from fam_optim.graph.trace import path_of
from fam_optim.layer.use import LOW_PRECISION, LinearUse, describe

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from fam_optim.estimators.measure import Factor
    from fam_optim.graph.corrections import Corrections
    from fam_optim.graph.independence import Groups
    from fam_optim.graph.trace import Tail
    from fam_optim.layer.use import Use

MAX_PRODUCTS = 1024
"""More vector-Jacobian products than this in one evaluation end in an error instead."""


class Jacobian:
    """Vector-Jacobian products from the outputs under a loss to the outputs z of several layers.

    Cost of a product: one backward from the loss to the lowest layer; with its derivative two more.
    """

    def __init__(self, tails: Sequence[Tail], *, differentiable: bool) -> None:
        self.tails, self.differentiable = tails, differentiable
        self.path = path_of(tails)
        self.ends = frozenset[Node]().union(*(tail.ends for tail in tails))
        self._corrections: Corrections = []
        if differentiable:
            errors.check_differentiable(self.path)
            with errors.explained("derivatives"):
                self._corrections = corrections(self.path, derivatives_to_come=1)
        self.outputs = find_outputs(
            tails[0].loss, self.path | self.ends, self.ends, differentiable=differentiable
        )
        self.uses = [
            tail.uses if differentiable else tuple(use.detached() for use in tail.uses) for tail in tails
        ]
        self._below = self._edges_below()

    def pull(self, r: Sequence[Tensor]) -> list[list[Pulled]]:
        """``d <S r, o>/dz`` for every use of every layer, r in the shapes of the outputs."""
        edges, vectors, scale = cotangents(self.outputs, r)
        at_z = [edge for tail in self.tails for edge in tail.edges]
        with errors.explained("derivatives"), corrected(self._corrections, derivatives_to_come=1):
            found: Sequence[Tensor | None] = torch.autograd.grad(
                edges,
                [*at_z, *self._below.values()],
                vectors,
                create_graph=self.differentiable,
                retain_graph=True,
                allow_unused=True,
            )
        if self.differentiable:
            errors.check_functions(self.path, self.ends, [g for g in found if g is not None])
        unscaled = [None if g is None else without_scale(g, scale) for g in found]
        products = dict(zip(self._below, unscaled[len(at_z) :], strict=True))
        deltas = iter(unscaled)
        return [[_pulled(use, next(deltas), products.get(use)) for use in uses] for uses in self.uses]

    def in_weights(self, layer: int, found: Sequence[Pulled]) -> Tensor:
        """g ``(d, m)`` of a layer, by position, through all uses of its weight."""
        of_uses = zip(self.uses[layer], self.tails[layer].edges, found, strict=True)
        return torch.stack([self._in_weight(use, edge, f.delta) for use, edge, f in of_uses]).sum(0)

    def _in_weight(self, use: Use, edge: GradientEdge, delta: Tensor) -> Tensor:
        node = edge.node
        below, output = node.next_functions[1] if nodes.kind(node) == "Convolution" else (None, 0)
        low = nodes.results(node)[0].dtype in LOW_PRECISION  # under autocast, say
        # Of a weight that is used again, the derivative below passes through phi too.
        if below is None or low or len(self.tails[0].parents[below]) > 1:
            return use.pull(delta)
        # The forward's own node, which spares the convolution that `pull` builds a graph with.
        (g,) = torch.autograd.grad(
            edge,
            GradientEdge(below, output),
            delta.reshape(nodes.shape(node, edge.output_nr)),  # a batch of one, if it had none
            create_graph=self.differentiable,
            retain_graph=True,
        )
        return use.layout.matrix(g)

    def _edges_below(self) -> dict[Use, GradientEdge]:
        """Where ``delta W`` is formed anyway, on the way to a layer below: at the input of a Linear layer on
        vectors, if nothing else reads it, in full precision."""
        readers = Counter(edge for node in self.path | self.ends for edge in node.next_functions)
        below: dict[Use, GradientEdge] = {}
        for tail, uses in zip(self.tails, self.uses, strict=True):
            for use, edge in zip(uses, tail.edges, strict=True):
                position = {"Addmm": 1, "Mm": 0}.get(nodes.kind(edge.node))  # of phi
                if position is None or not isinstance(use, LinearUse) or use.phi.dtype in LOW_PRECISION:
                    continue
                node, output = edge.node.next_functions[position]
                if node is not None and node in self.path and readers[node, output] == 1:
                    below[use] = GradientEdge(node, output)
        return below


class Pulled(NamedTuple):
    """A derivative at one use: ``delta``, in the shape of z, and ``delta W`` if that was formed anyway."""

    delta: Tensor
    product: Tensor | None


def _pulled(use: Use, delta: Tensor | None, product: Tensor | None) -> Pulled:
    if delta is None:
        return Pulled(use.matrix().detach().new_zeros(use.shape), None)
    return Pulled(delta.reshape(use.shape), product)


def gauss_newton(
    tails: Sequence[Tail],
    factors: Sequence[Factor],
    mode: str,
    n_samples: int,
    generator: torch.Generator | None,
    *,
    differentiable: bool,
) -> list[Tensor]:
    """``<F F^T, T_G>`` of every layer, never negative.

    Cost: for all layers together one vector-Jacobian product per probe (hutchinson), or per output of a
    sample where samples do not interact, else per output of the batch (exact). RuntimeError if that is more
    than `MAX_PRODUCTS`, or the loss is not known to be convex in the outputs.
    """
    jacobian = Jacobian(tails, differentiable=differentiable)
    if all(0 in output.shape for output in jacobian.outputs):  # no rows, or a loss linear in the outputs
        return [use.matrix().new_zeros(()) for use, *_ in jacobian.uses]
    if mode == "full":
        return _from_traces(jacobian, factors)
    shown = shown_axes(jacobian.tails, jacobian.uses, jacobian.path | jacobian.ends)
    if mode == "exact":
        return _from_columns(jacobian, factors, shown)
    like = jacobian.uses[0][0].matrix()
    groupings = [_grouping(jacobian, layer, list(axes)) for layer, axes in enumerate(shown)]
    groupings = [g if g is not None and (g.size == 1 or _has_few_rows(g)) else None for g in groupings]
    samples = []
    for _ in range(n_samples):
        r = [rademacher(tuple(output.shape), like, generator) for output in jacobian.outputs]
        samples.append(_squares(jacobian, factors, groupings, r))
    return [torch.stack(of_layer).mean() for of_layer in zip(*samples, strict=True)]


def _from_columns(
    jacobian: Jacobian, factors: Sequence[Factor], shown: Sequence[Mapping[int, Groups]]
) -> list[Tensor]:
    """``sum_c ||F^T g_c||^2`` of every layer; groups that all layers keep apart share a product."""
    axes, digits = _shared(jacobian, shown)
    numbers = [_by_group(output.shape, of) for output, of in zip(jacobian.outputs, digits, strict=True)]
    columns = sum(by_group.shape[1] for by_group in numbers)
    if columns > MAX_PRODUCTS:
        raise RuntimeError(
            f"exact Gauss-Newton kappa of `layer` {describe(jacobian.tails[0].layer)} takes {columns} "
            f"vector-Jacobian products here, more than the limit of {MAX_PRODUCTS}. Use "
            "mode='hutchinson', which is unbiased with one."
        )
    groupings = [_grouping(jacobian, layer, axes) for layer in range(len(factors))]
    values = [_squares(jacobian, factors, groupings, r) for r in _columns(jacobian, numbers)]
    return [torch.stack(of_layer).sum() for of_layer in zip(*values, strict=True)]


def _shared(
    jacobian: Jacobian, shown: Sequence[Mapping[int, Groups]]
) -> tuple[list[int], list[list[tuple[int, int]]]]:
    """The axes along which all layers keep as many groups apart, and for every output the digits, ``(stride,
    length)``, that say to which group its entries belong."""
    axes: list[int] = []
    digits: list[list[tuple[int, int]]] = [[] for _ in jacobian.outputs]
    for axis in set.intersection(*map(set, shown)):
        lengths = {use.lead[axis] for uses in jacobian.uses for use in uses}  # type: ignore[attr-defined]
        strides = [
            {shown[0][axis].strides.get((edge.node, edge.output_nr), SUM) for edge in output.edges}
            for output in jacobian.outputs
        ]
        if len(lengths) > 1 or any(len(of) > 1 or SUM in of for of in strides):
            continue
        axes.append(axis)
        for of_output, (stride,) in zip(digits, strides, strict=True):
            of_output.append((stride, *lengths))
    return axes, digits


def _by_group(shape: Sequence[int], digits: Sequence[tuple[int, int]]) -> Tensor:
    """The numbers of an output's entries, ``(groups, columns)``."""
    entries = torch.arange(math.prod(shape))
    group, groups = torch.zeros_like(entries), 1
    for stride, length in digits:
        group, groups = group * length + entries // stride % length, groups * length
    return group.argsort(stable=True).reshape(groups, -1)


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
        if _has_few_rows(grouping):
            return ((phi @ phi.mT) * factor.inner(delta)).sum().clamp_min(0)
        g = delta.mT @ phi
        return factor.square(g.movedim(0, 1).flatten(1))
    scale, pulled = factor.pulled(delta[:, 0], found[0].product if len(found) == 1 else None)
    return scale * (grouping.squared_norms()[:, 0] * pulled.square().sum(1)).sum()


def _columns(jacobian: Jacobian, numbers: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """One-hot vectors, one entry of every group: all columns of S, that of one output after the other."""
    like = jacobian.uses[0][0].matrix()
    for index, by_group in enumerate(numbers):
        for column in by_group.to(like.device).T:
            r = [like.new_zeros(other.shape) for other in jacobian.outputs]
            r[index].view(-1)[column] = 1
            yield r


def _from_traces(jacobian: Jacobian, factors: Sequence[Factor]) -> list[Tensor]:
    """``<F F^T, T>`` with T from every column of S by itself."""
    traces: list[Any] = [0.0] * len(factors)
    for r in _columns(jacobian, [_by_group(output.shape, ()) for output in jacobian.outputs]):
        for layer, found in enumerate(jacobian.pull(r)):
            g = jacobian.in_weights(layer, found)
            traces[layer] = traces[layer] + g @ g.T
    return [(factor.gram() * t).sum().clamp_min(0) for factor, t in zip(factors, traces, strict=True)]


def _grouping(jacobian: Jacobian, layer: int, axes: Sequence[int]) -> Grouping | None:
    """The groups of a layer's rows along some axes; None if there is but one."""
    uses = row_uses(jacobian.tails[layer], jacobian.uses[layer])
    return Grouping(uses, axes) if uses is not None and axes else None


def _has_few_rows(grouping: Grouping) -> bool:
    """Whether squares from the products of rows cost at most twice what the square of their sum does."""
    d, m, size = grouping.uses[0].d, grouping.uses[0].m, grouping.size
    return size * m + min(d * d + size * d, d * m + size * m) <= 2 * d * m
