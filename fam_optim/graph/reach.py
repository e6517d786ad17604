"""Walks the graph to find what a loss depends on, what lies between, and whether tensors were made alike."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor
from torch.autograd.graph import Node

from fam_optim.graph import nodes, operations


class LayerNotUsedError(RuntimeError):
    """The loss does not depend on the layer."""


class Reach(NamedTuple):
    """The weights that a loss depends on, and the nodes in between."""

    path: frozenset[Node]  # the nodes from which a weight can be reached
    leaves: dict[Tensor, Node]  # for every weight that was reached, the node that accumulates its gradient
    parents: dict[Node, list[Node]]  # for every node of the graph, the nodes that use its result


def reach(loss: Tensor, weights: Iterable[Tensor]) -> Reach:
    """Finds the weights that the loss depends on and the nodes in between, in one walk for all weights."""
    wanted = {id(weight): weight for weight in weights}
    parents = parents_below(loss)
    leaves = {wanted[id(leaf)]: node for node in parents if id(leaf := nodes.leaf(node)) in wanted}
    return Reach(above(leaves.values(), parents), leaves, parents)


def check_scalar(loss: Tensor) -> None:
    """Raises TypeError, ValueError or LayerNotUsedError unless `loss` is a single number with a graph."""
    if not isinstance(loss, Tensor):
        raise TypeError(f"expected `loss` to be a scalar tensor, got {type(loss).__name__}.")
    if loss.is_complex():
        raise TypeError(f"expected `loss` to be real, got {loss.dtype}. Take its .abs() or .real.")
    if loss.numel() != 1:
        raise ValueError(
            f"expected `loss` to be a scalar, got shape {tuple(loss.shape)}. Reduce it, say with .mean()."
        )
    if loss.grad_fn is None:
        raise LayerNotUsedError(
            "expected `loss` to depend on the layer, got one without a graph: it was computed under "
            "torch.no_grad() or inference_mode(), detached, or from nothing that requires gradients."
        )


def parents_below(loss: Tensor) -> dict[Node, list[Node]]:
    """Returns for every node of a loss's graph the nodes that use its result, in the order of a walk down."""
    root = loss.grad_fn
    parents: dict[Node, list[Node]] = {} if root is None else {root: []}
    walked = list(parents)
    for node in walked:  # the list grows during the loop
        for below, _ in node.next_functions:
            if below in parents:
                parents[below].append(node)
            elif below is not None:
                parents[below] = [node]
                walked.append(below)
    return parents


def above(ends: Collection[Node], parents: Mapping[Node, Sequence[Node]]) -> frozenset[Node]:
    """Returns the nodes from which one of `ends` can be reached in one or more steps."""
    return frozenset(spread(ends, parents.__getitem__))


def spread(starts: Iterable[Node], neighbours: Callable[[Node], Iterable[Any]]) -> set[Node]:
    """Returns the nodes that steps to neighbours lead to from `starts`; a start only if one leads to it."""
    seen: set[Node] = set()
    stack = list(starts)
    while stack:
        new = set(neighbours(stack.pop())) - seen
        seen |= new
        stack += new
    return seen


def is_of_weights(node: Node) -> bool:
    """Returns whether a node makes only weights, moved or scaled, or products of one weight with itself. The
    square of such is weight decay or a penalty on correlated rows, and no squared output of the network."""
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


_OF_ONE_WEIGHT = {"Mm", "Bmm", "LinalgVectorNorm", "ClampMin"}  # F.normalize uses the last two
_OF_WEIGHTS = operations.LINEAR | {"Mul", "Div"}
_OF_WEIGHTS -= {"Index", "IndexSelect", "Select", "Unbind", "Gather", "MaskedSelect"}  # lookups, say by data


def computed_alike(left: Tensor, right: Tensor) -> bool:
    """Returns whether the same operations made two tensors from the same tensors, as far as graphs show."""
    if left is right or not (left.requires_grad or right.requires_grad):
        return True
    return left.grad_fn is not None and same_graph(left.grad_fn, right.grad_fn)


def same_graph(left: Node | None, right: Node | None) -> bool:
    """Returns whether two graphs consist of the same operations, down to nodes that they share."""
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
