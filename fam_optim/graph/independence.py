"""Proof, from the graph alone, that groups of rows do not interact between some layers and the loss.

The groups lie along an axis of what a layer puts out. Where an entry lies along that axis is one digit of its
number, so the digit can be followed through reshapes, permutations and whatever leaves its axis alone
(`operations`). As long as every entry is computed from those of its own digit, groups are apart. Where they
are first put together it must be by adding, and from there to the loss everything must be linear: then the
loss is a sum over the groups. Nothing is looked at but names, shapes and axes. What is not known proves
nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from fam_optim.graph import nodes, operations
from fam_optim.graph.reach import spread

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Set

    from torch.autograd.graph import Node

    Result = tuple[Node, int]

SUM = 0
"""In place of a stride: every entry is a sum of functions of one group each. Where all entries are computed
from group i alone, it is ``-1 - i``."""


class Groups(NamedTuple):
    """What the graph shows about groups.

    Attributes:
        strides: by node and number of its result, the stride of the digit (`operations.moved`), or what
            stands in its place: see `SUM`.
        dependent: nodes between which and the loss groups may interact.
    """

    strides: Mapping[Result, int]
    dependent: Set[Node]


def follow(path: Set[Node], starts: Mapping[Result, int], length: int) -> Groups:
    """Follows groups, `length` many, from some layers to the loss.

    Args:
        path: the nodes between the layers and the loss, the layers' own included.
        starts: where z is made, and the stride of the groups' digit there.
        length: how many groups.

    Cost: a few microseconds per node, no arithmetic.
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
    """Whether the graph shows that the `groups` runs of z do not interact; False proves nothing.

    z is the output of a layer, or of several uses of several layers, each of which is cut into as many runs,
    one after the other in the order of its entries.

    Args:
        between: the nodes between z and the loss.
        ends: those that make z.
        groups: how many runs.
    """
    starts = {(end, 0): nodes.shape(end, 0).numel() // groups for end in ends}
    return not follow(between | ends, starts, groups).dependent & ends


def _after(
    node: Node, output: int, operands: list[tuple[int, Result]], strides: Mapping[Result, int], length: int
) -> int | None:
    """The digit's stride in a result, or what stands in its place; None where groups may interact."""
    kind, result = nodes.kind(node), nodes.shape(node, output)
    before = {strides[edge] for _, edge in operands}
    if len(before) == 1 and min(before) < SUM:
        return min(before)
    if min(before) > SUM:
        shapes = [(i, nodes.shape(*edge), strides[edge]) for i, edge in operands]
        after = {operations.moved(node, kind, i, shape, result, s, length) for i, shape, s in shapes}
        if len(after) == 1 and None not in after:
            return after.pop()
        entrywise = kind in operations.ENTRYWISE_LOSSES and len({shape for _, shape, _ in shapes}) == 1
        if entrywise and len(before) == 1 and result.numel() == 1:
            return SUM
        if kind == "Select" and (place := operations.axis_of_digit(shapes[0][1], shapes[0][2], length)):
            axis, inner = place
            selected = nodes.from_front(nodes.kept(node, "index"), shapes[0][1][axis])
            return -1 - selected // inner % length
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
