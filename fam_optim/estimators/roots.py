"""A, a random root of the Gauss-Newton ``T[s,u] = Tr(G_{s,u})``, ``E A A^T = T``, from one ordinary backward.

With random signs r and the root S of `graph.losses`,

    A    =  g = d<S r, o>/dW                (d, m)   any weight, whatever interacts
    A^T  =  rows ||phi_a|| d<S r, o>/dz_a   (N, d)   Linear on N < min(d, m) vectors that do not interact

Rows vary less, and take a solve of their own number. Micro-batches with signs of their own have one A
together, that of the whole batch: g adds up, rows are stacked.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from fam_optim.estimators.hutchinson import rademacher
from fam_optim.graph import errors, nodes
from fam_optim.graph.independence import independent
from fam_optim.graph.losses import cotangents, without_scale
from fam_optim.graph.reach import above
from fam_optim.layer.use import at_least_float32

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch.autograd.graph import Node

    from fam_optim.graph.losses import Output
    from fam_optim.graph.reach import Reach
    from fam_optim.layer.kinds import WeightMatrix


class Root(NamedTuple):
    """A of one loss and one draw of signs."""

    delta: Tensor  # g^T (m, d); or, of rows that do not interact, delta (N, d)
    phi: Tensor | None = None  # of such rows, (N, m)

    def matrix(self) -> Tensor:
        """A ``(d, q)``."""
        return (self.delta if self.phi is None else self.phi.norm(dim=1, keepdim=True) * self.delta).mT

    def whole(self) -> Tensor:
        """``g^T (m, d)``."""
        return self.delta if self.phi is None else self.phi.mT @ self.delta

    def plus(self, other: Root, fewest: int) -> Root:
        """A of two micro-batches; of rows as long as these are fewer than `fewest`."""
        if self.phi is None or other.phi is None or len(self.phi) + len(other.phi) >= fewest:
            return Root(self.whole() + other.whole())
        return Root(torch.cat([self.delta, other.delta]), torch.cat([self.phi, other.phi]))


Roots = dict[int, list[Root]]
"""A of several weights by number, one for each sample."""


def sample_roots(
    reached: Reach,
    outputs: Sequence[Output],
    weights: Sequence[WeightMatrix],
    products: Mapping[int, Node],
    generator: Callable[[torch.device], torch.Generator],
    n_samples: int,
) -> Roots:
    """A of every weight that a loss depends on, one backward from its outputs to the weights for each sample.

    Args:
        products: where A is made of rows, as `products_of_rows` found it.
        generator: of the signs, by device.
    """
    numbers = [i for i, w in enumerate(weights) if w.parameter in reached.leaves]
    ends = [products.get(i, reached.leaves[weights[i].parameter]) for i in numbers]
    roots: Roots = {}
    for _ in range(n_samples):
        pairs = [(tuple(output.shape), output.a) for output in outputs]
        signs = [rademacher(shape, like, generator(like.device)) for shape, like in pairs]
        edges, vectors, scale = cotangents(outputs, signs)
        if not edges:
            return {}
        with errors.explained("first derivatives"):
            found: Any = torch.autograd.grad(
                edges, [GradientEdge(end, 0) for end in ends], vectors, retain_graph=True, allow_unused=True
            )
        for i, g in zip(numbers, found, strict=True):
            if g is None:
                continue
            g = without_scale(g, scale)
            if i in products:
                # A copy: what is fed from a buffer may be overwritten before the step.
                dtype = at_least_float32(weights[i].parameter).dtype
                root = Root(g.to(dtype), _first_factor(products[i]).to(dtype, copy=True))
            else:
                root = Root(weights[i].of(g.to_dense() if g.is_sparse else g).mT)
            roots.setdefault(i, []).append(root)
    return roots


def products_of_rows(reached: Reach, weights: Sequence[WeightMatrix]) -> dict[int, Node]:
    """The products ``z = phi W^T``, by weight, whose rows are fewer than d and m and do not interact.

    Read off the graph. Left out are weights with a hook on their gradient, which would not see rows.
    """
    products: dict[int, Node] = {}
    for i, w in enumerate(weights):
        leaf = reached.leaves.get(w.parameter)
        if leaf is None or w.parameter._backward_hooks:
            continue
        product = _product_on_vectors(leaf, reached, transposed=not w.layout.inputs_first)
        if product is not None and 0 < nodes.shape(product, 0)[0] < min(w.d, w.m):
            products[i] = product
    sizes = {nodes.shape(product, 0)[0] for product in products.values()}
    ends = frozenset(products.values())
    apart = len(sizes) == 1 and independent(above(ends, reached.parents), ends, sizes.pop())
    return products if apart else {}


def _product_on_vectors(leaf: Node, reached: Reach, *, transposed: bool) -> Node | None:
    """The product ``z = phi W^T`` of a Linear layer on vectors, phi ``(N, m)``, if it is W's only use.

    W is transposed on its way if it is stored as ``(d, m)``.
    """
    below = leaf
    while len(reached.parents[below]) == 1:
        (node,) = reached.parents[below]
        kind = nodes.kind(node)
        if kind in ("Addmm", "Mm"):
            second_factor, _ = node.next_functions[-1]
            unscaled = kind == "Mm" or nodes.kept(node, "alpha") == 1
            return node if second_factor is below and not transposed and unscaled else None
        if kind == "T" and transposed:
            transposed = False
        elif kind != "ToCopy":  # of autocast
            return None
        below = node
    return None


def _first_factor(node: Node) -> Any:
    """What an Addmm or Mm multiplies with its second factor, whose derivative needs it: a tensor."""
    return nodes.kept(node, "mat1") if nodes.kind(node) == "Addmm" else nodes.kept(node, "self")


def added(left: Roots, right: Roots, weights: Sequence[WeightMatrix]) -> Roots:
    """A of two micro-batches together."""
    both = {**left, **right}
    for i in left.keys() & right.keys():
        fewest = min(weights[i].d, weights[i].m)
        both[i] = [a.plus(b, fewest) for a, b in zip(left[i], right[i], strict=True)]
    return both


def scaled(roots: Roots, factor: Tensor) -> Roots:
    """A times a number."""
    return {i: [Root(r.delta * factor.to(r.delta), r.phi) for r in of] for i, of in roots.items()}


def kept(roots: Roots, whether: Tensor) -> Roots:
    """A, or zero, whatever A is: nan too."""

    def one(t: Any) -> Any:
        return None if t is None else torch.where(whether.to(t.device), t, 0)

    return {i: [Root(one(r.delta), one(r.phi)) for r in of] for i, of in roots.items()}


def joined(samples: Sequence[Root]) -> Tensor:
    """A ``(d, q)`` of all samples side by side."""
    parts = [root.matrix() for root in samples]
    return torch.cat(parts, dim=1) / math.sqrt(len(parts)) if len(parts) > 1 else parts[0]
