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
from fam_optim.graph.losses import SoftmaxOutput, linear_in
from fam_optim.layer.use import LayerUse, at_least_float32

if TYPE_CHECKING:
    from collections.abc import Mapping, Set

    from torch import Tensor
    from torch.autograd.graph import GradientEdge, Node

    from fam_optim.graph.trace import Tail


_KINDS = operations.MOVES | operations.ADDITIONS | {"Mul", "Div", "Gather"}


class Head(NamedTuple):
    """One softmax of one use's output.

    Attributes:
        output: the softmax.
        use, edge: the layer's use that it belongs to, and where that makes z.
        in_order: whether log p has the rows of z, in their order and unscaled.
        scaled: whether there may be factors between z and the softmax.
    """

    output: SoftmaxOutput
    use: LayerUse
    edge: GradientEdge
    in_order: bool
    scaled: bool


class _Step(NamedTuple):
    """An operation between the layer and log_softmax, and which of its operands comes from the layer."""

    node: Node
    position: int
    operand: torch.Size
    result: torch.Size


def find_heads(tail: Tail, *, differentiable: bool) -> list[Head] | None:
    """The tail as softmax heads, or None if it is anything else."""
    ends = {edge.node: (use, edge) for use, edge in zip(tail.uses, tail.edges, strict=True)}
    if tail.nested or not all(isinstance(use, LayerUse) and use.has_rows for use in tail.uses):
        return None
    path = tail.path | tail.ends
    terms = linear_in(tail.loss, path, set(ends), {"LogSoftmax"})
    heads = []
    for node in terms.nodes if terms else ():
        way = _way_down(node, path, ends)
        if way is None:
            return None
        end, steps = way
        use, edge = ends[end]
        assert isinstance(use, LayerUse)
        if not _over_the_outputs(node, use, steps):
            return None
        assert terms is not None
        with errors.explained("derivatives"):
            output = SoftmaxOutput(node, tail.loss, differentiable, terms.constant)
        heads.append(Head(output, use, edge, _in_order(use, steps), any(map(_scales, steps))))
    return heads or None


def to_softmax(head: Head, by_row: Tensor) -> Tensor:
    """One number per row of z, to where that row is in front of the softmax, times the row's factor there.

    That is the transpose of the derivative of what lies between the two.
    """
    at_z = by_row.unsqueeze(head.use.channel).expand(head.use.shape)
    with torch.enable_grad():
        zeros = torch.zeros(head.output.shape, dtype=by_row.dtype, device=by_row.device, requires_grad=True)
        made = nodes.results(head.output.edges[0].node)[head.output.edges[0].output_nr].dtype
        (back,) = torch.autograd.grad(
            head.output.edges[0], head.edge, zeros.to(made), create_graph=True, retain_graph=True
        )
        back = at_least_float32(back).reshape(head.use.shape)
        (moved,) = torch.autograd.grad(back, zeros, at_z.to(back.dtype), create_graph=True)
    return at_least_float32(moved).select(head.output.dim, 0)


def _way_down(softmax: Node, path: Set[Node], ends: Mapping[Node, object]) -> tuple[Node, list[_Step]] | None:
    """The one way from a log_softmax down to an output of the layer, the layer's steps first."""
    steps: list[_Step] = []
    below, output = softmax.next_functions[0]
    while below is not None and below not in ends:
        inputs = nodes.inputs_of(below, output)
        on_path = [i for i, (operand, _) in enumerate(inputs) if operand in path]
        if len(on_path) != 1:
            return None
        operand, its_output = inputs[on_path[0]]
        assert operand is not None
        shapes = nodes.shape(operand, its_output), nodes.shape(below, output)
        steps.append(_Step(below, on_path[0], *shapes))
        below, output = operand, its_output
    return None if below is None else (below, steps[::-1])


def _over_the_outputs(softmax: Node, use: LayerUse, steps: list[_Step]) -> bool:
    """Whether a softmax is taken over exactly the d outputs of one row, in their order, times one number.

    The axis of the outputs is followed up to the softmax.
    """
    stride: int | None = math.prod(use.shape[use.channel % len(use.shape) + 1 :])
    for step in steps:
        kind = nodes.kind(step.node)
        if kind not in _KINDS:
            return False
        assert stride is not None
        stride = operations.moved(step.node, kind, *step[1:], stride, use.d)
        if stride is None:
            return False
        if kind in ("Mul", "Div", "Gather") and not _one_number(step, stride, use.d):
            return False
    shape, dim = nodes.shape(softmax, 0), nodes.softmax_axis(softmax)
    assert stride is not None
    return shape[dim] == use.d and operations.axis_of_digit(shape, stride, use.d) == (dim, 1)


def _one_number(step: _Step, stride: int, d: int) -> bool:
    """Whether all outputs of a row are multiplied with one number of the graph, or picked by one index: not
    with numbers that are equal now."""
    if nodes.kind(step.node) == "Div" and step.position != 0:
        return False
    place = operations.axis_of_digit(step.result, stride, d)
    other = nodes.other_operand(step.node, step.position)
    if place is None or other is None:
        return False
    axis = place[0] - len(step.result) + other.dim()
    return axis < 0 or other.shape[axis] == 1 or other.stride(axis) == 0


def _scales(step: _Step) -> bool:
    kind = nodes.kind(step.node)
    return kind in ("Mul", "Div", "Neg", "Rsub") or (kind in ("Add", "Sub") and step.position == 1)


def _in_order(use: LayerUse, steps: list[_Step]) -> bool:
    """Whether there are only new views and shifts."""
    last = use.channel % len(use.shape) == len(use.shape) - 1
    same = (s for s in steps if nodes.kind(s.node) not in operations.VIEWS)
    return last and all(s.operand == s.result and not _scales(s) and _shifts(s) for s in same)


def _shifts(step: _Step) -> bool:
    return nodes.kind(step.node) in ("Add", "Sub")
