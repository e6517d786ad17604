"""Softmax heads: whether every softmax under the loss is of all outputs of one row, times one number.

Between the loss and log_softmax there must be only operations linear in the latter, and between log_softmax
and the layer's output only ones that move rows, scale them or shift them. All of it is read off the graph.
Whatever is not recognised goes the general way.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch

from fam_optim.graph import errors, nodes, operations
from fam_optim.graph.losses import Softmax, linear_in, softmax_of
from fam_optim.layer.use import LayerUse, at_least_float32

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence, Set

    from torch import Tensor
    from torch.autograd.graph import GradientEdge, Node

    from fam_optim.graph.trace import Tail

_KINDS = operations.MOVES | operations.ADDITIONS | {"Mul", "Div"}


class Head(NamedTuple):
    """One softmax of one use's output.

    Attributes:
        softmax: what the loss takes in.
        use, edge: the layer's use that it belongs to, and where that makes z.
        in_order: whether log p is known to have the rows of z, in their order and unscaled.
    """

    softmax: Softmax
    use: LayerUse
    edge: GradientEdge
    in_order: bool


def find_heads(tail: Tail, *, differentiable: bool) -> list[Head] | None:
    """The tail as softmax heads, or None if it is anything else."""
    ends = {edge.node: (use, edge) for use, edge in zip(tail.uses, tail.edges, strict=True)}
    path = tail.path | tail.ends
    terms = None if tail.nested else linear_in(tail.loss, path, set(ends), {"LogSoftmax"})
    if terms is None:
        return None
    heads = []
    for node in terms.nodes:
        end, steps = _way_down(node, path, ends)
        if end is None:
            return None
        use, edge = ends[end]
        if not isinstance(use, LayerUse) or not _over_the_outputs(node, use, steps):
            return None
        with errors.explained("derivatives"):
            softmax = softmax_of(node, tail.loss, differentiable, terms.constant)
        last = use.channel % len(use.shape) == len(use.shape) - 1
        in_order = last and all(nodes.kind(step[0]) in operations.VIEWS for step in steps)
        heads.append(Head(softmax, use, edge, in_order))
    return heads or None


def to_softmax(head: Head, by_row: Tensor) -> Tensor:
    """One number per row of z, to where that row is in front of the softmax, times the square of the row's
    factor there.

    A number is moved, and multiplied with the factor once, by the transpose of the derivative of what lies
    between the two.
    """
    at_z = by_row.unsqueeze(head.use.channel).expand(head.use.shape)
    edge, log_p, dim, _ = head.softmax
    with torch.enable_grad():
        zeros = torch.zeros(log_p.shape, dtype=by_row.dtype, device=by_row.device, requires_grad=True)
        made = nodes.results(edge.node)[edge.output_nr].dtype
        (back,) = torch.autograd.grad(edge, head.edge, zeros.to(made), create_graph=True, retain_graph=True)
        back = at_least_float32(back).reshape(head.use.shape)
        moved, factor = (
            torch.autograd.grad(back, zeros, at.to(back.dtype), create_graph=True)[0]
            for at in (at_z, torch.ones_like(at_z))
        )
    return at_least_float32(moved * factor).select(dim, 0)


def _way_down(
    softmax: Node, path: Set[Node], ends: Collection[Node]
) -> tuple[Node | None, list[tuple[Node, int, torch.Size, torch.Size]]]:
    """The output of the layer that a log_softmax is taken of, if there is one way down to it, and the
    operations on that way, the layer's first: node, position of the operand on the way, its shape, that of
    the result."""
    steps = []
    node, output = softmax.next_functions[0]
    while node is not None and node not in ends:
        inputs = nodes.inputs_of(node, output)
        on_path = [i for i, (operand, _) in enumerate(inputs) if operand in path]
        if len(on_path) != 1:
            return None, []
        operand, its_output = inputs[on_path[0]]
        assert operand is not None
        steps.append((node, on_path[0], nodes.shape(operand, its_output), nodes.shape(node, output)))
        node, output = operand, its_output
    return node, steps[::-1]


def _over_the_outputs(
    softmax: Node, use: LayerUse, steps: Sequence[tuple[Node, int, torch.Size, torch.Size]]
) -> bool:
    """Whether a softmax is taken over exactly the d outputs of one row, in their order, times one number.

    The axis of the outputs is followed up to the softmax.
    """
    if not use.has_rows:
        return False
    stride = math.prod(use.shape[use.channel % len(use.shape) + 1 :])
    for node, position, operand, result in steps:
        kind = nodes.kind(node)
        if kind not in _KINDS or (kind in ("Mul", "Div") and not nodes.by_one_number(node, position)):
            return False
        to = operations.moved(node, kind, position, operand, result, stride, use.d)
        if to is None:
            return False
        stride = to
    shape, dim = nodes.shape(softmax, 0), nodes.softmax_axis(softmax)
    return shape[dim] == use.d and operations.axis_of_digit(shape, stride, use.d) == (dim, 1)
