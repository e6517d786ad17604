"""From a loss down to the weights that it depends on, in one walk over its graph."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any, NamedTuple

from fam_optim.graph import nodes, operations

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

    from torch import Tensor
    from torch.autograd.graph import Node


class Reach(NamedTuple):
    """What a loss reaches.

    Attributes:
        path: the nodes from which a weight can be reached.
        leaves: the node that accumulates a weight's gradient, for every weight that was reached.
        parents: the nodes that use a node's result, for every node of the graph.
    """

    path: frozenset[Node]
    leaves: dict[Tensor, Node]
    parents: dict[Node, list[Node]]


def reach(loss: Tensor, weights: Iterable[Tensor]) -> Reach:
    """What of some weights the loss depends on.

    Cost: a microsecond or two per node of the graph, whatever the number of weights.
    """
    wanted = {id(weight): weight for weight in weights}
    parents = parents_below(loss)
    of_leaves = ((nodes.leaf(node), node) for node in parents)
    leaves = {wanted[id(leaf)]: node for leaf, node in of_leaves if id(leaf) in wanted}
    return Reach(above(leaves.values(), parents), leaves, parents)


def parents_below(loss: Tensor) -> dict[Node, list[Node]]:
    """The nodes that use a node's result, for every node of a loss's graph, in the order of a walk down."""
    root = loss.grad_fn
    parents: dict[Node, list[Node]] = {} if root is None else {root: []}
    queue = deque(parents)
    while queue:
        node = queue.popleft()
        for below, _ in node.next_functions:
            if below is None:
                continue
            if below not in parents:
                parents[below] = []
                queue.append(below)
            parents[below].append(node)
    return parents


def above(ends: Collection[Node], parents: Mapping[Node, Sequence[Node]]) -> frozenset[Node]:
    """The nodes from which one of `ends` can be reached, without `ends` unless reached from there."""
    return frozenset(spread(ends, parents.__getitem__))


def spread(starts: Iterable[Node], neighbours: Callable[[Node], Iterable[Any]]) -> set[Node]:
    """The nodes that one comes to from some others, step by step; these only if one returns."""
    seen: set[Node] = set()
    stack = list(starts)
    while stack:
        new = set(neighbours(stack.pop())) - seen
        seen |= new
        stack += new
    return seen


def is_of_weights(node: Node) -> bool:
    """Whether what a node makes is a weight itself, moved or scaled: its square is weight decay, and no
    output of the network."""
    stack = [node]
    while stack:
        node = stack.pop()
        if nodes.leaf(node) is None:
            if nodes.kind(node) not in _OF_WEIGHTS:
                return False
            stack += [below for below, _ in node.next_functions if below is not None]
    return True


_OF_WEIGHTS = operations.LINEAR | {"Mul", "Div"}
_OF_WEIGHTS -= {"Index", "IndexSelect", "Select", "Unbind", "Gather", "MaskedSelect"}  # looked up, as by data


def product_on_vectors(leaf: Node, reached: Reach, *, transposed: bool) -> Node | None:
    """The product ``z = phi W^T`` of a Linear layer on vectors, phi ``(N, m)``, if it is W's only use.

    Args:
        leaf: the node of the weight.
        transposed: whether the weight is stored as W ``(d, m)``, and so transposed on its way.
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
