"""Proves from the graph alone that groups of rows of a layer's output do not interact behind the layer.

A row is one vector that the layer put out: a sample, a token, a position of a convolution. Rows that do not
interact have no mixed second derivatives, so one Hessian-vector product serves all of them.

Groups lie along an axis of z. An entry's place along it is one digit of the entry's number, which can be
followed through reshapes, permutations and all else that leaves its axis alone (`operations`). Groups are
apart as long as every entry is computed only from entries with the same digit. The operation that first joins
groups must add them, and from there to the loss everything must be linear. What is not known proves nothing.
"""

import math
from collections.abc import Mapping, Sequence, Set
from graphlib import TopologicalSorter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import Node

from fam_optim.graph import nodes, operations
from fam_optim.graph.reach import spread
from fam_optim.graph.trace import Tail
from fam_optim.layer.use import LayerUse

Result = tuple[Node, int]

SUM = 0  # stands for a stride where every entry is a sum of terms that depend on one group each


class Groups(NamedTuple):
    """What the graph shows about whether groups interact."""

    strides: Mapping[Result, int]  # of the digit (`operations.moved`) in each result, or `SUM`
    dependent: Set[Node]  # the nodes that feed an operation in which groups may interact


def follow(path: Mapping[Node, None], starts: Mapping[Result, int], length: int) -> Groups:
    """Follows `length` groups along a path from some layers, whose own nodes it includes, to the loss.
    `path` is from `_operands_first`; `starts` has the stride of the groups' digit in each z."""
    strides: dict[Result, int] = {}
    mixing: list[Node] = []
    for node in path:
        operands = [(i, edge) for i, edge in enumerate(node.next_functions) if edge in strides]
        for output in range(len(nodes.results(node))):
            found = _after(node, output, operands, strides, length) if operands else None
            start = starts.get((node, output))
            if operands and (found is None or start not in (None, found)):
                mixing.append(node)
            known = found if start is None else start
            if known is not None:
                strides[node, output] = known
    return Groups(strides, spread(mixing, lambda node: {n for n, _ in node.next_functions if n in path}))


def independent(between: frozenset[Node], ends: frozenset[Node], groups: int) -> bool:
    """Returns whether the graph shows that `groups` parts of z do not interact; False proves nothing. Every
    node of `ends` makes a z, whose entries are cut, in their order, into `groups` runs of equal length.
    `between` holds the nodes from there to the loss."""
    starts = {(end, 0): nodes.shape(end, 0).numel() // groups for end in ends}
    return not follow(_operands_first(between | ends), starts, groups).dependent & ends


def _after(
    node: Node, output: int, operands: list[tuple[int, Result]], strides: Mapping[Result, int], length: int
) -> int | None:
    """Returns the digit's stride in a result, or `SUM`; None where groups may interact."""
    kind, result = nodes.kind(node), nodes.shape(node, output)
    before = {strides[edge] for _, edge in operands}
    if SUM not in before:
        shapes = [(i, nodes.shape(*edge), strides[edge]) for i, edge in operands]
        after = {operations.moved(node, kind, i, shape, result, s, length) for i, shape, s in shapes}
        if len(after) == 1 and None not in after:
            return after.pop()
        entrywise = kind in operations.ENTRYWISE_LOSSES and len({shape for _, shape, _ in shapes}) == 1
        if entrywise and len(before) == 1 and result.numel() == 1:
            return SUM
    return SUM if operations.is_linear(kind, [i for i, _ in operands]) else None


def _operands_first(path: Set[Node]) -> Mapping[Node, None]:
    """Returns the nodes of a path, each after the nodes that it is computed from."""
    operands: Any = {node: [n for n, _ in node.next_functions if n in path] for node in path}
    return dict.fromkeys(TopologicalSorter(operands).static_order())


class Grouping:
    """A partition of the rows of all uses of a layer into ``groups`` equal groups of ``size`` rows. Groups
    lie along some axes of z's rows. Axis 0 makes every sample a group, all axes every row of a use, and no
    axis makes a single group. Rows at the same place in several uses are in one group."""

    def __init__(self, uses: Sequence[LayerUse], axes: Sequence[int]) -> None:
        self.uses = uses
        self.axes = tuple(axes)
        self.groups = math.prod(uses[0].lead[axis] for axis in self.axes)
        self._sizes = [math.prod(use.lead[a] for a in range(len(use.lead)) if a not in axes) for use in uses]
        self.size = sum(self._sizes)

    def gather(self, by_row: Sequence[Tensor]) -> Tensor:
        """Joins one tensor ``(*lead, ...)`` per use into one of shape ``(groups, size, ...)``."""
        front = list(range(len(self.axes)))
        split = [
            t.movedim(self.axes, front).reshape(self.groups, size, *t.shape[len(use.lead) :])
            for t, use, size in zip(by_row, self.uses, self._sizes, strict=True)
        ]
        return torch.cat(split, 1)

    def scatter(self, grouped: Tensor) -> list[Tensor]:
        """Splits ``(groups, size, k)`` into one tensor per use, in z's shape with k (1 or d) channels."""
        front = list(range(len(self.axes)))
        scattered = []
        for part, use in zip(torch.split(grouped, self._sizes, 1), self.uses, strict=True):
            shape = torch.empty(use.lead, device="meta").movedim(self.axes, front).shape
            rows = part.reshape(*shape, part.shape[-1]).movedim(front, self.axes)
            scattered.append(rows.movedim(-1, use.channel))
        return scattered

    def gather_outputs(self, outputs: Sequence[Tensor]) -> Tensor:
        """Joins one tensor in z's shape per use into one of shape ``(groups, size, d)``."""
        return self.gather([t.movedim(use.channel, -1) for t, use in zip(outputs, self.uses, strict=True)])

    def squared_norms(self) -> Tensor:
        """Returns ``||phi_a||^2`` for every row a, ``(groups, size)``."""
        return self.gather([use.squared_norms() for use in self.uses])


def find_grouping(tail: Tail) -> Grouping | None:
    """Returns the finest grouping whose groups the graph proves not to interact; None without rows."""
    of_rows = row_uses(tail)
    if of_rows is None:
        return None
    (axes,) = shown_axes([tail], tail.path | tail.ends)
    return Grouping(of_rows, list(axes))


def shown_axes(tails: Sequence[Tail], path: Set[Node]) -> list[dict[int, Groups]]:
    """Returns for every layer the axes along which its rows do not interact, each with what the graph shows.
    Rows that interact along no axis do not interact at all. The path is that of all tails, the layers' own
    nodes included. It is walked once for every axis and length of it."""
    ordered = _operands_first(path)
    layers: dict[tuple[int, int], list[int]] = {}  # by number and length of their axes
    for number, tail in enumerate(tails):
        leads = [use.lead for use in row_uses(tail) or ()]
        for axis, lengths in enumerate(zip(*leads, strict=False)):
            if len(set(lengths)) == 1:
                layers.setdefault((axis, lengths[0]), []).append(number)
    shown: list[dict[int, Groups]] = [{} for _ in tails]
    for (axis, length), numbers in sorted(layers.items()):
        starts = {
            edge[:2]: torch.empty(use.shape, device="meta").movedim(use.channel, -1).stride(axis)
            for number in numbers
            for use, edge in zip(tails[number].uses, tails[number].edges, strict=True)
        }
        groups = follow(ordered, starts, length)
        for number in numbers:
            if tails[number].ends.isdisjoint(groups.dependent):
                shown[number][axis] = groups
    return shown


def row_uses(tail: Tail) -> list[LayerUse] | None:
    """Returns the layer's uses if each output vector has one input vector and no call feeds another."""
    of_rows = [use for use in tail.uses if isinstance(use, LayerUse) and use.has_rows]
    return None if len(of_rows) < len(tail.uses) or tail.nested else of_rows
