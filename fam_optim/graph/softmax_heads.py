"""Softmax heads: whether a layer feeds a softmax cross-entropy, read off the graph.

Between the loss and log_softmax there must be only operations linear in the latter, and between log_softmax
and the layer's output only ones that move entries, scale or shift them. That each softmax is of all outputs
of one row, in their order, times one factor, is read off the graph too where entries are moved along other
axes than that of the classes, and else seen to by numbers. Whatever is not recognised goes the general way.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch.autograd.graph import GradientEdge

from fam_optim.graph import nodes, verdicts
from fam_optim.graph.linear import descend
from fam_optim.layer.use import LayerUse, at_least_float32

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor
    from torch.autograd.graph import Node

    from fam_optim.graph.trace import Tail

# Kinds of nodes.
_ORDER_KEEPING = {"View", "UnsafeView", "ReshapeAlias", "Squeeze", "Unsqueeze", "Clone", "ToCopy", "Alias"}
_ORDER_KEEPING |= {nodes.DDP_SINK}
_MOVING = _ORDER_KEEPING | {"Transpose", "Permute", "T", "Slice", "Select", "Expand"}
_MOVING |= {"Index", "IndexSelect", "Gather"}
_SHIFT, _SCALE = "a shift", "a factor"


class Move(NamedTuple):
    """An operation between the layer and log_softmax, and the shapes of what it moves from and to."""

    kind: str
    node: Node
    operand: torch.Size
    result: torch.Size


class SoftmaxHead(NamedTuple):
    """One log_softmax of one use's output.

    Attributes:
        node: the log_softmax.
        use, edge: the layer's use that it belongs to.
        moves: the operations between the two, the layer's first.
        constant: whether the weights a do not depend on anything that is differentiated.
    """

    node: Node
    use: LayerUse
    edge: GradientEdge
    moves: tuple[Move, ...]
    constant: bool


def find_softmax_heads(tail: Tail) -> list[SoftmaxHead] | None:
    """The tail as softmax heads, or None if it is anything else."""
    ends = {
        edge.node: (use, edge)
        for use, edge in zip(tail.uses, tail.edges, strict=True)
        if isinstance(use, LayerUse) and use.has_rows
    }
    if tail.nested or len(ends) < len(tail.uses):
        return None
    path = {*tail.path, *ends}
    descended = descend(tail.loss, path, set(ends), {"LogSoftmax"})
    if descended is None:
        return None
    softmaxes, constant = descended.leaves, descended.constant
    heads = []
    for node in softmaxes:
        head = _find_head(node, tail, path, ends, constant)
        if head is None or not _over_the_outputs(head, tail):
            return None
        heads.append(head)
    return heads or None


def _find_head(
    node: Node,
    tail: Tail,
    path: set[Node],
    ends: dict[Node, tuple[LayerUse, GradientEdge]],
    constant: bool,
) -> SoftmaxHead | None:
    """The way down from a log_softmax to an output of the layer, if it is affine and by entries."""
    moves: list[Move] = []
    below, output = node.next_functions[0]
    while below is not None and below not in ends:
        inputs = nodes.inputs_of(below, output)
        on_path = [position for position, (operand, _) in enumerate(inputs) if operand in path]
        kind = _affine(nodes.kind(below), on_path)
        if kind is None:
            return None
        operand, its_output = inputs[on_path[0]]
        assert operand is not None
        moves.append(Move(kind, below, nodes.shape(operand, its_output), nodes.shape(below, output)))
        below, output = operand, its_output
    if below is None:
        return None
    use, edge = ends[below]
    return SoftmaxHead(node, use, edge, tuple(reversed(moves)), constant)


def _affine(kind: str, on_path: list[int]) -> str | None:
    """What an operation does to its operands on the path, if it is affine in one of them, entry by entry."""
    if kind in ("Add", "Sub"):  # the second operand comes with a factor, alpha
        return _SHIFT if on_path == [0] else _SCALE if on_path == [1] else None
    if kind in ("Mul", "Neg") or (kind == "Div" and on_path == [0]):
        return _SCALE if len(on_path) == 1 else None
    return kind if kind in _MOVING and len(on_path) == 1 else None


def _over_the_outputs(head: SoftmaxHead, tail: Tail) -> bool:
    """Whether each softmax is taken over exactly the d outputs of one row of the layer, times one factor."""
    log_p: Tensor = head.node._saved_result  # type: ignore[attr-defined]
    dim = nodes.softmax_axis(head.node)
    if log_p.shape[dim] != head.use.d:
        return False
    shown = _classes_behind(head) == dim
    if shown and not scales(head):
        return True

    def check(new: bool) -> Tensor:
        with torch.no_grad():
            return verdicts.outcome(_one_factor(head, dim) if shown else _whole_rows(head, dim))

    key = verdicts.signature(tail, "softmax over the outputs", log_p.shape, dim)
    return verdicts.of(tail.layer).holds(key, check)


def scales(head: SoftmaxHead) -> bool:
    """Whether there may be factors between the layer and the softmax."""
    return any(move.kind == _SCALE for move in head.moves)


def keeps_order(head: SoftmaxHead) -> bool:
    """Whether log p has the rows of z, in the order of z and unscaled."""
    if not head.moves:
        return True
    last = head.use.channel % len(head.use.shape) == len(head.use.shape) - 1
    shifts = all(move.operand == move.result for move in head.moves if move.kind == _SHIFT)
    return last and shifts and {move.kind for move in head.moves} <= _ORDER_KEEPING | {_SHIFT}


def _classes_behind(head: SoftmaxHead) -> int | None:
    """The axis that the classes lie along in front of the softmax; None if the graph does not show it."""
    shape = nodes.shape(head.edge.node, head.edge.output_nr)
    axis = _viewed(head.use.channel % len(head.use.shape), head.use.shape, shape)
    for move in head.moves:
        axis = None if axis is None else _moved(axis, move)
    return axis


def _moved(axis: int, move: Move) -> int | None:
    """Where a move takes an axis, which stays as it is; None if it does not, or may not."""
    dimensions = len(move.operand)
    if move.kind in _ORDER_KEEPING:
        return _viewed(axis, move.operand, move.result)
    if move.kind == "Permute":
        return nodes.order(move.node, dimensions).index(axis)
    if move.kind == "T":
        return 1 - axis
    if move.kind == "Transpose":
        swapped = [nodes.axis(move.node, name, dimensions) for name in ("dim0", "dim1")]
        return swapped[1 - swapped.index(axis)] if axis in swapped else axis
    if move.kind in ("Slice", "Select"):
        along = nodes.axis(move.node, "dim", dimensions)
        return None if along == axis else axis - (move.kind == "Select" and along < axis)
    if move.kind in ("Expand", _SHIFT, _SCALE):
        ahead = len(move.result) - dimensions  # new axes come first
        return axis + ahead if move.result[axis + ahead] == move.operand[axis] else None
    return None


def _viewed(axis: int, old: torch.Size, new: torch.Size) -> int | None:
    """Where `axis` is in a view with other axes, if it is there as it was."""
    before, sizes = math.prod(old[:axis]), [math.prod(new[:i]) for i in range(len(new))]
    found = [i for i, length in enumerate(new) if sizes[i] == before and length == old[axis]]
    return found[0] if found else None


def _one_factor(head: SoftmaxHead, dim: int) -> Tensor:
    """Whether the classes of a softmax are scaled alike."""
    factor = to_softmaxes(head, ones(head))
    return (factor == factor.narrow(dim, 0, 1)).all()


def _whole_rows(head: SoftmaxHead, dim: int) -> Tensor:
    """Whether each softmax is of one row's outputs, in their order and scaled alike.

    The rows and the classes of z are numbered and the numbers followed to the softmaxes, digit by digit, as
    low precisions hold small numbers only.
    """
    factor = to_softmaxes(head, ones(head))
    same = _one_factor(head, dim) & (factor != 0).all()
    rows = torch.arange(math.prod(head.use.lead), device=factor.device).reshape(head.use.lead)
    for digit in _digits(rows):
        found = to_softmaxes(head, digit) / factor
        same = same & ((found - found.narrow(dim, 0, 1)).abs() < 0.25).all()
    for digit in _digits(torch.arange(head.use.d, device=factor.device)):
        at_z = _along(digit, head.use.channel, len(head.use.shape)).expand(head.use.shape)
        found = _forward(head, at_z) / factor
        same = same & ((found - _along(digit, dim, factor.dim())).abs() < 0.25).all()
    return same


def _digits(numbers: Tensor, base: int = 16) -> Iterator[Tensor]:
    """The digits of whole numbers, the last first, as floating-point numbers."""
    for place in range(len(f"{numbers.numel():x}")):
        yield (numbers // base**place % base).float()


def _along(vector: Tensor, axis: int, dimensions: int) -> Tensor:
    """A vector along one of so many axes."""
    shape = [1] * dimensions
    shape[axis] = -1
    return vector.reshape(shape)


def ones(head: SoftmaxHead) -> Tensor:
    """1 for every row of the layer."""
    return torch.ones(head.use.lead, device=head.use.phi.device)


def to_softmaxes(head: SoftmaxHead, by_row: Tensor) -> Tensor:
    """One number per row of z, to where its entries are in front of the softmax, times their factors."""
    return _forward(head, by_row.unsqueeze(head.use.channel).expand(head.use.shape))


def _forward(head: SoftmaxHead, at_z: Tensor) -> Tensor:
    """Numbers laid out as z, through the operations in front of the softmax but for shifts: the transpose of
    their derivative."""
    log_p: Tensor = head.node._saved_result  # type: ignore[attr-defined]
    with torch.enable_grad():
        zeros = torch.zeros_like(log_p, requires_grad=True)
        below, output = head.node.next_functions[0]
        assert below is not None
        (back,) = torch.autograd.grad(
            GradientEdge(below, output), head.edge, zeros, create_graph=True, retain_graph=True
        )
        back = at_least_float32(back).reshape(head.use.shape)
        (moved,) = torch.autograd.grad(back, zeros, at_z.to(back.dtype), create_graph=True)
    return at_least_float32(moved)
