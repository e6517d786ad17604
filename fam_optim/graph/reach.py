"""Walks over the graph: what a loss depends on, what lies between, whether two tensors were made alike."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from fam_optim.graph import nodes, operations

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

    from torch.autograd.graph import Node


class LayerNotUsedError(RuntimeError):
    """The loss does not depend on the layer."""


class Reach(NamedTuple):
    """What a loss reaches."""

    path: frozenset[Node]  # from which a weight can be reached
    leaves: dict[Tensor, Node]  # of the weights that were reached, where their gradients accumulate
    parents: dict[Node, list[Node]]  # those that use a node's result, for every node of the graph


def reach(loss: Tensor, weights: Iterable[Tensor]) -> Reach:
    """What of some weights the loss depends on.

    Cost: a microsecond or two per node of the graph, whatever the number of weights.
    """
    wanted = {id(weight): weight for weight in weights}
    parents = parents_below(loss)
    of_leaves = ((nodes.leaf(node), node) for node in parents)
    leaves = {wanted[id(leaf)]: node for leaf, node in of_leaves if id(leaf) in wanted}
    return Reach(above(leaves.values(), parents), leaves, parents)


def check_scalar(loss: Tensor) -> None:
    """Raises TypeError, ValueError or LayerNotUsedError unless `loss` is a single number with a graph."""
    if not isinstance(loss, Tensor):
        raise TypeError(f"expected `loss` to be a scalar tensor, got {type(loss).__name__}.")
    if loss.is_complex():
        raise TypeError(f"expected `loss` to be real, got {loss.dtype}. Take its .abs() or .real.")
    if loss.numel() != 1:
        raise ValueError(
            f"expected `loss` to be a scalar, got shape {tuple(loss.shape)}. Reduce it first, "
            "for example with .mean()."
        )
    if loss.grad_fn is None:
        raise LayerNotUsedError(
            "expected `loss` to depend on the layer, got one without a graph: it was computed under "
            "torch.no_grad() or inference_mode(), detached, or from nothing that requires gradients."
        )


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
    """Whether what a node makes is weights themselves, moved or scaled, or products of a weight with itself:
    its square is weight decay or a penalty on correlated rows, and no output of the network."""
    leaves: set[Node] = set()
    products = False
    stack = [node]
    while stack:
        node = stack.pop()
        kind, below = nodes.kind(node), [n for n, _ in node.next_functions]
        if nodes.leaf(node) is not None:
            leaves.add(node)
        elif kind in _OF_WEIGHTS or (kind in _OF_ONE_WEIGHT and None not in below):
            products = products or kind in _OF_ONE_WEIGHT
            stack += [n for n in below if n is not None]
        else:
            return False
    return len(leaves) == 1 or not products


_OF_ONE_WEIGHT = {"Mm", "Bmm", "LinalgVectorNorm", "ClampMin"}  # F.normalize takes the last two
_OF_WEIGHTS = operations.LINEAR | {"Mul", "Div"}
_OF_WEIGHTS -= {"Index", "IndexSelect", "Select", "Unbind", "Gather", "MaskedSelect"}  # looked up, as by data


def computed_alike(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors were computed by the same operations from the same tensors, as far as the graph
    shows it."""
    if left is right or not (left.requires_grad or right.requires_grad):
        return True
    return left.grad_fn is not None and same_graph(left.grad_fn, right.grad_fn)


def same_graph(left: Node | None, right: Node | None) -> bool:
    """Whether two graphs are of the same operations, down to nodes that they share."""
    if left is right:
        return True
    if left is None or right is None or left.name() != right.name():
        return False
    below = list(zip(left.next_functions, right.next_functions, strict=False))
    return (
        len(left.next_functions) == len(right.next_functions) > 0
        and nodes.settings(left) == nodes.settings(right)
        and all(a[1] == b[1] and same_graph(a[0], b[0]) for a, b in below)
    )
