"""Vector-Jacobian products from a network's outputs to several layers: for Gauss-Newton curvature."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from fam_optim.graph import calls, errors, nodes
from fam_optim.graph.corrections import corrected
from fam_optim.graph.losses import cotangents, find_outputs
from fam_optim.graph.trace import path_of
from fam_optim.layer.use import LOW_PRECISION, LinearUse, at_least_float32

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fam_optim.graph.trace import Tail
    from fam_optim.layer.use import Use


class Jacobian:
    """Vector-Jacobian products from the outputs under a loss to the outputs z of several layers.

    Cost of a product: one backward from the loss to the lowest layer; with its derivative two more.
    """

    def __init__(self, tails: Sequence[Tail], *, differentiable: bool) -> None:
        self.tails, self.differentiable = tails, differentiable
        self.path = path_of(tails)
        self.ends = frozenset[Node]().union(*(tail.ends for tail in tails))
        if differentiable:
            errors.check_differentiable(self.path)
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
        right = corrected(self.path if self.differentiable else (), derivatives_to_come=1)
        with errors.explained("derivatives"), right:
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
        weight = calls.weight_of_convolution(edge.node)
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
        return use.layout.matrix(g)

    def _edges_below(self) -> dict[Use, GradientEdge]:
        """Where ``delta W`` is formed anyway, on the way to a layer below: at the input of a Linear layer on
        vectors, if nothing else reads it, in full precision."""
        above = self.path | self.ends
        readers = Counter(edge for node in above for edge in node.next_functions)
        below: dict[Use, GradientEdge] = {}
        for tail, uses in zip(self.tails, self.uses, strict=True):
            for use, edge in zip(uses, tail.edges, strict=True):
                position = _PRODUCTS.get(nodes.kind(edge.node))
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


def without_scale(g: Tensor, scale: Any) -> Tensor:
    """A derivative of what `cotangents` has scaled, in at least float32."""
    return at_least_float32(g) if isinstance(scale, float) else at_least_float32(g) / scale


_PRODUCTS = {"Addmm": 1, "Mm": 0}
"""Nodes of a Linear layer on vectors, and which of their operands is phi."""
