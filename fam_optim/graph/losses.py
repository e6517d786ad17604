"""The network's outputs o under a loss that is convex in them, and a root S of its Hessian there.

    L = sum_i a_i l(o_i, y_i),    a_i Hess_o l(o_i, y_i) = S_i S_i^T

    softmax cross-entropy                 S r = sqrt(a) (sqrt(p) r - p <sqrt(p), r>)
    binary cross-entropy with logits      S   = diag sqrt(a p (1 - p))
    squared error                         S   = sqrt(2 a)

Which losses a loss is a sum of is read off the graph: between it and log_softmax, the binary cross-entropy or
the square there are only operations linear in these. Whatever else it is ends in an error.

Source: DESIGN, 7.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch.autograd.graph import GradientEdge

from fam_optim.graph import nodes
from fam_optim.graph.linear import descend
from fam_optim.layer.use import at_least_float32

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor
    from torch.autograd.graph import Node


class Output(Protocol):
    """One o of the loss.

    Attributes:
        edges: where o is made; or, of a difference that is squared, its two sides.
        shape: of o.
    """

    edges: list[GradientEdge]
    shape: torch.Size

    def root(self, r: Tensor) -> list[Tensor]:
        """``S r`` for r in the shape of o, at each edge."""

    def weights(self) -> Tensor:
        """The a, none of which may be negative."""


def find_outputs(
    loss: Tensor, path: frozenset[Node], ends: frozenset[Node], *, differentiable: bool
) -> list[Output]:
    """The outputs that the loss is a convex function of, as far as it depends on some layers.

    Args:
        loss: the scalar.
        path: the nodes between the loss and the layers, the layers' own included.
        ends: the layers' own.
        differentiable: whether what is returned carries gradients.

    Raises:
        RuntimeError: if the loss is not known to be convex in them.
    """
    descent = descend(loss, path, ends, _KINDS.keys())
    made = []
    for node in () if descent is None else descent.leaves:
        output = _KINDS[nodes.kind(node)](node, loss, path, differentiable)
        if output is None:
            descent = None
            break
        made.append(output)
    if descent is None:
        raise RuntimeError(
            "curvature='gauss_newton' needs a loss that is known to be convex in the network's outputs: "
            "softmax cross-entropy, binary cross-entropy with logits, squared error, or a weighted sum of "
            "these (F.cross_entropy, F.binary_cross_entropy_with_logits, F.mse_loss). This one ends in "
            f"{loss.grad_fn.name() if loss.grad_fn else loss}. Use curvature='hessian' for it."
        )
    return made


def cotangents(
    outputs: Sequence[Output], r: Sequence[Tensor]
) -> tuple[list[GradientEdge], list[Tensor], Any]:
    """``S r`` at every edge of the outputs, in the edge's precision, and the factor that it was scaled by.

    The factor is 1 but for float16, which has as much room below the largest entry then as there is above.
    """
    edges = [edge for output in outputs for edge in output.edges]
    vectors = [v for output, signs in zip(outputs, r, strict=True) for v in output.root(signs)]
    dtypes = [nodes.results(edge.node)[edge.output_nr].dtype for edge in edges]
    scale: Any = 1.0
    if torch.float16 in dtypes:
        largest = torch.stack([v.detach().abs().max() for v in vectors]).max()
        scale = (-largest.clamp_min(2.0**-24).log2().ceil()).exp2()
        vectors = [scale * v for v in vectors]
    return edges, [v.to(dtype) for v, dtype in zip(vectors, dtypes, strict=True)], scale


def _coefficient(node: Node, loss: Tensor, differentiable: bool) -> Tensor:
    """dL/d(the node's result)."""
    if node is loss.grad_fn:
        return torch.ones_like(loss)
    (coefficient,) = torch.autograd.grad(
        loss, GradientEdge(node, 0), create_graph=differentiable, retain_graph=True
    )
    return coefficient if differentiable else coefficient.detach()


def _root_of(weights: Tensor) -> Tensor:
    """The root of what is not negative, whose derivative at 0 is 0: what counts nothing moves nothing.

    So a weight that is learned, and exactly 0, learns nothing from kappa.
    """
    positive = weights > 0
    return torch.where(positive, torch.where(positive, weights, 1).sqrt(), 0)


class SoftmaxOutput:
    """``-sum_k c_k log p_k``, p the softmax of o along one axis; a is the sum of c."""

    def __init__(self, node: Node, loss: Tensor, differentiable: bool) -> None:
        self.dim = nodes.softmax_axis(node)
        log_p: Tensor = node._saved_result  # type: ignore[attr-defined]
        descent = -_coefficient(node, loss, differentiable)
        self._log_p = at_least_float32(log_p if differentiable else log_p.detach())
        self._a = at_least_float32(descent).sum(self.dim, keepdim=True)
        self.edges = [_operand(node, 0)]
        self.shape = self._log_p.shape

    def weights(self) -> Tensor:
        return self._a

    def root(self, r: Tensor) -> list[Tensor]:
        root_p = (self._log_p / 2).exp()
        along = (root_p * r).sum(self.dim, keepdim=True)
        return [_root_of(self._a) * root_p * (r - root_p * along)]


class DiagonalOutput:
    """A loss that is a sum over the entries of o, b being its second derivative in each.

    Args:
        sides: the operands that o is the difference of, by position, and their signs.
    """

    def __init__(self, node: Node, b: Tensor, sides: dict[int, float]) -> None:
        self._b = b
        self._signs = list(sides.values())
        self.edges = [_operand(node, position) for position in sides]
        self.shape = b.shape

    def weights(self) -> Tensor:
        return self._b

    def root(self, r: Tensor) -> list[Tensor]:
        root = _root_of(self._b) * r
        return [sign * root for sign in self._signs]


def _operand(node: Node, position: int) -> GradientEdge:
    below, output = node.next_functions[position]
    assert below is not None
    return GradientEdge(below, output)


def _softmax(node: Node, loss: Tensor, path: frozenset[Node], differentiable: bool) -> Output | None:
    return SoftmaxOutput(node, loss, differentiable)


def _binary(node: Any, loss: Tensor, path: frozenset[Node], differentiable: bool) -> Output | None:
    """``w ((1 - y) o + (1 + (v - 1) y) log(1 + exp(-o)))`` with class weights v on the positives."""
    if [i for i, (below, _) in enumerate(node.next_functions) if below in path] != [0]:
        return None
    o, target = at_least_float32(node._saved_self), node._saved_target
    p = (o if differentiable else o.detach()).sigmoid()
    b = p * (1 - p)
    if node._saved_pos_weight is not None:
        b = b * (1 + (node._saved_pos_weight - 1) * target)
    if node._saved_weight is not None:
        b = b * node._saved_weight
    return DiagonalOutput(node, b * _per_entry(node, loss, b, differentiable), {0: 1.0})


def _squared_error(node: Any, loss: Tensor, path: frozenset[Node], differentiable: bool) -> Output | None:
    both = zip((1.0, -1.0), node.next_functions, strict=True)
    sides = {i: sign for i, (sign, (below, _)) in enumerate(both) if below in path}
    like = at_least_float32(node._saved_self.detach())
    twice = torch.full_like(like, 2.0)
    return DiagonalOutput(node, twice * _per_entry(node, loss, twice, differentiable), sides)


def _square(node: Any, loss: Tensor, path: frozenset[Node], differentiable: bool) -> Output | None:
    """``o.square()``, of a difference or of anything but another loss, whose outputs are others."""
    if node._saved_exponent != 2 or _contains_a_loss(node, path):
        return None
    twice = torch.full_like(at_least_float32(node._saved_self.detach()), 2.0)
    return DiagonalOutput(node, twice * _coefficient(node, loss, differentiable), {0: 1.0})


def _contains_a_loss(node: Node, path: frozenset[Node]) -> bool:
    """Whether a cross-entropy or squared error is among what the node is computed from."""
    losses = _KINDS.keys() - {"Pow"}
    stack, seen = [node], {node}
    while stack:
        for below, _ in stack.pop().next_functions:
            if below in path and below not in seen:
                assert below is not None
                if nodes.kind(below) in losses:
                    return True
                seen.add(below)
                stack.append(below)
    return False


def _per_entry(node: Any, loss: Tensor, like: Tensor, differentiable: bool) -> Tensor:
    """dL by an entry of the loss that the node reduces."""
    coefficient = _coefficient(node, loss, differentiable)
    return coefficient / like.numel() if node._saved_reduction == _MEAN else coefficient


_MEAN = 1  # of torch's reductions
_KINDS = {
    "LogSoftmax": _softmax,
    "BinaryCrossEntropyWithLogits": _binary,
    "MseLoss": _squared_error,
    "Pow": _square,
}
