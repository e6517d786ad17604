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

import math
from collections import Counter
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from fam_optim import failures, independence, nodes, verdicts
from fam_optim.corrections import exact_backwards
from fam_optim.curvature import check_differentiable, check_functions
from fam_optim.estimators.hutchinson import rademacher
from fam_optim.outputs import find_outputs
from fam_optim.rows import Grouping, in_order, row_uses
from fam_optim.use import LOW_PRECISION, LinearUse, at_least_float32, describe

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from fam_optim.measure import Factor
    from fam_optim.outputs import Output
    from fam_optim.tail import Tail
    from fam_optim.use import Use

MAX_PRODUCTS = 1024
"""More vector-Jacobian products than this in one evaluation end in an error instead."""


class Jacobian:
    """Vector-Jacobian products from the outputs under a loss to the outputs z of several layers.

    Cost of a product: one backward from the loss to the lowest layer; with its derivative two more.
    """

    def __init__(self, tails: Sequence[Tail], *, differentiable: bool) -> None:
        self.tails, self.differentiable = tails, differentiable
        self.path = frozenset(node for tail in tails for node in tail.path)
        if differentiable:
            check_differentiable(self.path)
        self.outputs = find_outputs(tails, differentiable=differentiable)
        _check_weights(tails[0], self.outputs)
        self.sizes = [math.prod(output.shape) for output in self.outputs]
        self.uses = [
            tail.uses if differentiable else tuple(use.detached() for use in tail.uses) for tail in tails
        ]
        self._below = self._edges_below()

    def pull(self, r: Sequence[Tensor]) -> list[list[Pulled]]:
        """``d <S r, o>/dz`` for every use of every layer, r in the shapes of the outputs."""
        edges, vectors = [], []
        for output, signs in zip(self.outputs, r, strict=True):
            edges += output.edges
            vectors += output.root(signs)
        at_z = [edge for tail in self.tails for edge in tail.edges]
        at_phi = [edge for edge in self._below.values() if edge is not None]
        found = self._backward(edges, at_z + at_phi, vectors)
        deltas = iter(found[: len(at_z)])
        through = iter(found[len(at_z) :])
        return [[self._pulled(use, next(deltas), through) for use in uses] for uses in self.uses]

    def _pulled(self, use: Use, gradient: Tensor | None, through: Iterator[Tensor | None]) -> Pulled:
        below = next(through) if self._below[use] is not None else None
        if gradient is None:
            return Pulled(use.matrix().detach().new_zeros(use.shape), None)
        delta = at_least_float32(gradient).reshape(use.shape)
        return Pulled(delta, None if below is None else at_least_float32(below))

    def _backward(self, edges: Any, inputs: Any, vectors: Sequence[Tensor]) -> Sequence[Tensor | None]:
        if not edges:
            return [None] * len(inputs)
        dtypes = [nodes.results(edge.node)[edge.output_nr].dtype for edge in edges]
        scale = None
        if torch.float16 in dtypes:  # as much room below as there is above
            largest = torch.stack([v.detach().abs().max() for v in vectors]).max()
            scale = (-largest.clamp_min(2.0**-24).log2().ceil()).exp2()
            vectors = [scale * v for v in vectors]
        vectors = [v.to(dtype) for v, dtype in zip(vectors, dtypes, strict=True)]
        try:
            with exact_backwards(self.path if self.differentiable else (), first=False):
                found: Sequence[Tensor | None] = torch.autograd.grad(
                    edges,
                    inputs,
                    vectors,
                    create_graph=self.differentiable,
                    retain_graph=True,
                    allow_unused=True,
                )
        except RuntimeError as error:
            remedy = failures.remedy(error)
            if remedy is None:
                raise
            raise RuntimeError(f"kappa needs derivatives of what follows the layer. {remedy}") from error
        if self.differentiable:
            check_functions(self.path, [g for g in found if g is not None])
        if scale is None:
            return found
        return [None if g is None else at_least_float32(g) / scale for g in found]

    def in_weights(self, layer: int, found: Sequence[Pulled]) -> Tensor:
        """g ``(d, m)`` of a layer, by position, through all uses of its weight."""
        of_uses = zip(self.uses[layer], self.tails[layer].edges, found, strict=True)
        return torch.stack([self._in_weight(use, edge, f.delta) for use, edge, f in of_uses]).sum(0)

    def _in_weight(self, use: Use, edge: GradientEdge, delta: Tensor) -> Tensor:
        weight = nodes.weight_of_convolution(edge.node)
        if weight is None or nodes.results(edge.node)[0].dtype in LOW_PRECISION:  # under autocast, say
            return use.pull(delta)
        # The forward's own node, which spares the convolution that `pull` builds a graph with.
        (g,) = torch.autograd.grad(
            edge,
            GradientEdge(*weight),
            delta.reshape(nodes.shape(edge.node, edge.output_nr)),  # a batch of one, if it had none
            create_graph=self.differentiable,
            retain_graph=True,
        )
        return use.as_matrix(g)

    def _edges_below(self) -> dict[Use, GradientEdge | None]:
        """Where ``delta W`` is formed anyway, on the way to a layer below: at the input of a Linear layer on
        vectors, if nothing else reads it, in full precision."""
        above = self.path.union(*(tail.ends for tail in self.tails))
        readers = Counter(edge for node in above for edge in node.next_functions)
        below: dict[Use, GradientEdge | None] = {}
        for tail, uses in zip(self.tails, self.uses, strict=True):
            for use, edge in zip(uses, tail.edges, strict=True):
                below[use] = None
                position = _PRODUCTS.get(nodes.kind(edge.node))
                if position is None or not isinstance(use, LinearUse) or use.phi.dtype in LOW_PRECISION:
                    continue
                node, output = edge.node.next_functions[position]
                if node in self.path and readers[node, output] == 1:
                    assert node is not None
                    below[use] = GradientEdge(node, output)
        return below


class Pulled(NamedTuple):
    """A derivative at one use: ``delta``, in the shape of z, and ``delta W`` if that was formed anyway."""

    delta: Tensor
    through: Tensor | None


_PRODUCTS = {"Addmm": 1, "Mm": 0}
"""Nodes of a Linear layer on vectors, and which of their operands is phi."""


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
        if whole and independence.independent(jacobian.tails, groups):
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


def _check_weights(tail: Tail, outputs: Sequence[Output]) -> None:
    """Raises RuntimeError if a sample counts less than nothing: the loss is not convex then."""
    if not outputs:
        return

    def check(new: bool) -> Tensor:
        weights = torch.cat([output.weights().detach().flatten().float() for output in outputs])
        rounding = torch.finfo(torch.float16).eps * weights.abs().max()  # of gradients that cancel
        return verdicts.outcome((weights >= -rounding).all(), weights.isfinite().all())

    key = verdicts.signature(tail, "weights of samples")
    if not verdicts.of(tail.layer).holds(key, check, insist=True):
        raise RuntimeError(
            "curvature='gauss_newton' needs a loss that is convex in the network's outputs, and some sample "
            "or class counts with a negative weight. Use curvature='hessian' for it."
        )
