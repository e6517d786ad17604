"""One ordinary backward gives A, a random root of the Gauss-Newton ``T[s,u] = Tr(G_{s,u})``: ``E A A^T = T``.

With the network's outputs o, random signs r and the root S from `graph.losses`, A has one of two forms:

    A    =  g = d<S r, o>/dW                (d, m)   any weight, even if samples interact
    A^T  =  rows ||phi_a|| d<S r, o>/dz_a   (N, d)   Linear on N < min(d, m) vectors that do not interact

The form made of rows has less variance, and needs only a solve of N x N. Micro-batches with independent signs
together have the A of the whole batch: their g are added, their rows are stacked.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from fam_optim.estimators.hutchinson import rademacher
from fam_optim.estimators.running_mean import stack
from fam_optim.graph import nodes
from fam_optim.graph.independence import independent
from fam_optim.graph.losses import Output, pulled
from fam_optim.graph.reach import Reach, above
from fam_optim.layer.kinds import WeightMatrix
from fam_optim.layer.use import at_least_float32


class Root(NamedTuple):
    """A of one weight from one loss, for each of some samples, that is, draws of signs."""

    delta: Tensor  # g^T (samples, m, d); if A is made of rows, d<S r, o>/dz (samples, N, d)
    phi: Tensor | None = None  # the layer's inputs (N, m), if A is made of rows

    def matrix(self) -> Tensor:
        """Returns one A ``(d, q)`` of all samples, side by side, over the root of their number."""
        of_samples = self.delta if self.phi is None else self.phi.norm(dim=1, keepdim=True) * self.delta
        a = of_samples.flatten(0, 1).mT
        return a / math.sqrt(len(of_samples)) if len(of_samples) > 1 else a  # spares a copy

    def whole(self) -> Tensor:
        """Returns ``g^T (samples, m, d)``, in either form."""
        return self.delta if self.phi is None else self.phi.mT @ self.delta

    def plus(self, other: "Root") -> "Root":
        """Returns A of two micro-batches together, made of rows if these are fewer than d and m."""
        if self.phi is not None and other.phi is not None:
            phi, delta = torch.cat([self.phi, other.phi]), torch.cat([self.delta, other.delta], 1)
            if len(phi) < min(phi.shape[-1], delta.shape[-1]):
                return Root(delta, phi)
        return Root(self.whole() + other.whole())

    def times(self, factor: Tensor) -> "Root":
        """Returns A times a number."""
        return Root(self.delta * factor.to(self.delta), self.phi)

    def kept_if(self, whether: Tensor) -> "Root":
        """Returns A unchanged if `whether` is true, and zeros if not, even in place of nan."""
        parts: Any = (t if t is None else torch.where(whether.to(t.device), t, 0) for t in self)
        return Root(*parts)


Roots = dict[int, Root]  # A of each weight, by its number


def sample_roots(
    reached: Reach,
    outputs: Sequence[Output],
    weights: Sequence[WeightMatrix],
    products: Mapping[int, Node],
    generator: Callable[[torch.device], torch.Generator],
    n_samples: int,
) -> Roots:
    """Returns A of every weight that the loss depends on, made of rows where `products` has the product of
    these; takes one backward to the weights per sample. `generator` returns the one of a device's signs."""
    numbers = [i for i, w in enumerate(weights) if w.parameter in reached.leaves]
    ends = [GradientEdge(products.get(i, reached.leaves[weights[i].parameter]), 0) for i in numbers]
    found = []
    for _ in range(n_samples):
        signs = [rademacher(tuple(o.shape), o.a, generator(o.a.device)) for o in outputs]
        found.append(pulled(outputs, signs, ends, differentiable=False))
    roots: Roots = {}
    for i, *samples in zip(numbers, *found, strict=True):
        weight, gs = weights[i], [g for g in samples if g is not None]
        if gs and i in products:
            dtype = at_least_float32(weight.parameter).dtype
            # The product keeps phi for the weight's derivative.
            phi = nodes.kept(products[i], "mat1" if nodes.kind(products[i]) == "Addmm" else "self")
            # Copied, since a buffer that holds the inputs may be overwritten before the step.
            roots[i] = Root(stack(gs).to(dtype), phi.to(dtype, copy=True))
        elif gs:
            roots[i] = Root(stack([weight.of(g.to_dense() if g.is_sparse else g).mT for g in gs]))
    return roots


def products_of_rows(reached: Reach, weights: Sequence[WeightMatrix]) -> dict[int, Node]:
    """Returns, by weight, the products ``z = phi W^T`` with fewer rows than d and m that do not interact. The
    graph shows this. It leaves out weights with a hook on their gradient, which rows would bypass."""
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
    """Returns the product ``z = phi W^T`` of a Linear layer on vectors phi ``(N, m)``, if W has no other use.
    `transposed` says that W is stored as ``(d, m)``, and the graph must transpose it before the product."""
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
        elif kind != "ToCopy":  # autocast's cast to a lower precision
            return None
        below = node
    return None


def added(left: Roots, right: Roots, factor: Tensor) -> Roots:
    """Returns A of two micro-batches together, the right one times a factor, for every weight."""
    right = {i: root.times(factor) for i, root in right.items()}
    return left | right | {i: left[i].plus(right[i]) for i in left.keys() & right.keys()}
