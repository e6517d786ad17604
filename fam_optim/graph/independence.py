"""Rows of a layer's output, and proof, from the graph alone, that groups of them do not interact behind it.

A row is one vector that the layer put out: a sample, a token, a position of a convolution. Rows that do not
interact have no mixed second derivatives, so one Hessian-vector product serves all of them.

Groups lie along an axis of z. Where an entry lies along it is one digit of its number, which can be followed
through reshapes, permutations and whatever leaves its axis alone (`operations`). As long as every entry is
computed from those of its own digit, groups are apart. Where they are first put together it must be by
adding, and from there to the loss everything must be linear. What is not known proves nothing.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch

from fam_optim.graph import nodes, operations
from fam_optim.graph.reach import spread
from fam_optim.layer.use import LayerUse

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence, Set

    from torch import Tensor
    from torch.autograd.graph import Node

    from fam_optim.graph.trace import Tail
    from fam_optim.layer.use import Use

    Result = tuple[Node, int]

SUM = 0
"""In place of a stride: every entry is a sum of functions of one group each."""


class Groups(NamedTuple):
    """What the graph shows about groups.

    Attributes:
        strides: by node and number of its result, the stride of the digit (`operations.moved`), or `SUM`.
        dependent: nodes between which and the loss groups may interact.
    """

    strides: Mapping[Result, int]
    dependent: Set[Node]


def follow(path: Set[Node], starts: Mapping[Result, int], length: int) -> Groups:
    """Follows groups, `length` many, along a path from some layers, their own nodes included, to the loss.

    Args:
        starts: where z is made, and the stride of the groups' digit there.
    """
    strides: dict[Result, int] = {}
    mixing: list[Node] = []
    for node in _operands_first(path):
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
    """Whether the graph shows that `groups` runs of z do not interact; False proves nothing.

    Every z that one of `ends` makes is cut into as many runs, one after the other in the order of its
    entries; `between` are the nodes from there to the loss.
    """
    starts = {(end, 0): nodes.shape(end, 0).numel() // groups for end in ends}
    return not follow(between | ends, starts, groups).dependent & ends


def _after(
    node: Node, output: int, operands: list[tuple[int, Result]], strides: Mapping[Result, int], length: int
) -> int | None:
    """The digit's stride in a result, or `SUM`; None where groups may interact."""
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


def _operands_first(path: Set[Node]) -> Iterable[Node]:
    """The nodes of a path, each behind those that it is computed from."""
    done: dict[Node, None] = {}
    for root in path:
        stack = [root]
        while stack:
            below = [n for n, _ in stack[-1].next_functions if n in path and n not in done]
            if below:
                stack.extend(n for n in below if n is not None)
            else:
                done[stack.pop()] = None
    return done


class Grouping:
    """A partition of the rows of all uses of a layer into ``groups`` equal groups of ``size`` rows.

    Groups lie along some axes of z's rows: (0,) for samples; all of them: every row of one use is a group;
    none: there is one group. Of several uses the rows at one place are in one group.
    """

    def __init__(self, uses: Sequence[LayerUse], axes: Sequence[int]) -> None:
        self.uses = uses
        self.axes = tuple(axes)
        self.groups = math.prod(uses[0].lead[axis] for axis in self.axes)
        self._sizes = [math.prod(use.lead[a] for a in range(len(use.lead)) if a not in axes) for use in uses]
        self.size = sum(self._sizes)

    def gather(self, by_row: Sequence[Tensor]) -> Tensor:
        """One tensor ``(*lead, ...)`` per use, to ``(groups, size, ...)``."""
        front = list(range(len(self.axes)))
        split = [
            t.movedim(self.axes, front).reshape(self.groups, size, *t.shape[len(use.lead) :])
            for t, use, size in zip(by_row, self.uses, self._sizes, strict=True)
        ]
        return torch.cat(split, 1)

    def scatter(self, grouped: Tensor) -> list[Tensor]:
        """``(groups, size, k)`` to one tensor in z's shape per use, k being 1 or d."""
        front = list(range(len(self.axes)))
        scattered = []
        for part, use in zip(torch.split(grouped, self._sizes, 1), self.uses, strict=True):
            others = [length for axis, length in enumerate(use.lead) if axis not in self.axes]
            lengths = [use.lead[axis] for axis in self.axes]
            rows = part.reshape(*lengths, *others, part.shape[-1]).movedim(front, self.axes)
            scattered.append(rows.movedim(-1, use.channel))
        return scattered

    def gather_outputs(self, outputs: Sequence[Tensor]) -> Tensor:
        """One tensor in z's shape per use, to ``(groups, size, d)``."""
        return self.gather([t.movedim(use.channel, -1) for t, use in zip(outputs, self.uses, strict=True)])

    def squared_norms(self) -> Tensor:
        """``||phi_a||^2`` ``(groups, size)``."""
        return self.gather([use.squared_norms() for use in self.uses])


def find_grouping(tail: Tail, uses: Sequence[Use]) -> Grouping | None:
    """The finest grouping of a layer's rows whose groups the graph shows not to interact."""
    of_rows = row_uses(tail, uses)
    if of_rows is None:
        return None
    (axes,) = shown_axes([tail], [uses], tail.path | tail.ends)
    return Grouping(of_rows, list(axes))


def shown_axes(
    tails: Sequence[Tail], uses: Sequence[Sequence[Use]], path: Set[Node]
) -> list[dict[int, Groups]]:
    """For every layer the axes of its rows along which these do not interact, and what the graph shows.

    Rows that interact along no axis do not interact at all. The path is that of all tails, the layers' own
    nodes included; it is walked once for every length of an axis.
    """
    layers: dict[tuple[int, int], list[int]] = {}  # by number and length of an axis that they have
    for number, (tail, of_layer) in enumerate(zip(tails, uses, strict=True)):
        leads = [use.lead for use in row_uses(tail, of_layer) or ()]
        for axis, lengths in enumerate(zip(*leads, strict=False)):
            if len(set(lengths)) == 1:
                layers.setdefault((axis, lengths[0]), []).append(number)
    shown: list[dict[int, Groups]] = [{} for _ in tails]
    for (axis, length), numbers in sorted(layers.items()):
        groups = Groups({}, frozenset())
        if length > 1:
            starts = {
                (edge.node, edge.output_nr): _stride(use, axis)
                for number in numbers
                for use, edge in zip(uses[number], tails[number].edges, strict=True)
            }
            groups = follow(path, starts, length)
        for number in numbers:
            if tails[number].ends.isdisjoint(groups.dependent):
                shown[number][axis] = groups
    return shown


def row_uses(tail: Tail, uses: Sequence[Use]) -> list[LayerUse] | None:
    """The uses of the tail's layer, if each output vector belongs to one input vector."""
    of_rows = [use for use in uses if isinstance(use, LayerUse) and use.has_rows]
    return None if len(of_rows) < len(uses) or tail.nested else of_rows


def _stride(use: Use, axis: int) -> int:
    """By how much the number of an entry of z grows with its place along an axis of the rows."""
    channel = use.channel % len(use.shape)
    return math.prod(use.shape[axis + (axis >= channel) + 1 :])
