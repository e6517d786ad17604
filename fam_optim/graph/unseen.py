"""Calls of a layer that left no record: a loss that depends on them beside recorded ones is refused."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch.autograd.graph import get_gradient_edge

from fam_optim.graph import calls, nodes, operations
from fam_optim.layer.record import Observation, recorded_use
from fam_optim.layer.use import describe

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch import Tensor
    from torch.autograd.graph import Node

    from fam_optim.layer.use import Use


_SAME_NUMBERS = operations.VIEWS | {"Expand"}


def check_all_seen(
    parents: Mapping[Node, Sequence[Node]], uses_of: Sequence[tuple[Observation | Tensor, Sequence[Use]]]
) -> None:
    """Raises RuntimeError if the loss depends on a call of a layer that was not recorded, or on a parameter
    whose gradient is sparse.

    Args:
        parents: the nodes that use a node's result, for every node of the loss's graph.
        uses_of: the layers, and their uses that were found.
    """
    recorded = _recorded_products(parents)
    checkpoints = [node for node in parents if nodes.is_reentrant_checkpoint(node)]
    for layer, uses in uses_of:
        if isinstance(layer, Observation):
            unseen = {p for start in _weights(layer, uses) for p in _products(start, parents, layer)}
            if not unseen <= recorded or any(map(layer.called_within, checkpoints)):
                raise RuntimeError(_unseen(layer))
        elif uses and any(map(nodes.has_sparse_gradient, parents[get_gradient_edge(layer).node])):
            raise RuntimeError(
                f"`layer`, a {describe(layer)}, has a sparse gradient, which has no second derivative. Build "
                "the embedding with sparse=False."
            )


def _unseen(layer: Observation) -> str:
    return (
        f"`loss` depends on the weight of `layer` {describe(layer.module)} through a call that was not "
        "observed: layer.forward(...) or a function with its weight (nn.MultiheadAttention uses "
        "out_proj.weight), a call within torch.func (vmap, grad, ...), in a reentrant checkpoint, of another "
        "module that shares the weight, or before the last step. Call the layer as a module, checkpoint with "
        "use_reentrant=False, name all modules that share the weight, or pass the weight, an nn.Parameter, "
        "as `layer` with mode='hutchinson', which counts every use."
    )


def _recorded_products(parents: Mapping[Node, Sequence[Node]]) -> set[Node | None]:
    """The products of all calls that were recorded, of whatever layer, and not forgotten."""
    found = ((node, recorded_use(node)) for node in parents)
    return {calls.product_of_call(node) for node, record in found if record and not record[0].is_released}


def _weights(layer: Observation, uses: Sequence[Use]) -> set[Node]:
    """Where the weights begin that the layer's calls were made with; its own if there were none."""
    own = layer.module._parameters.get("weight")
    weights: list[Tensor | None] = [use.weight for use in uses] or [own]
    return {
        get_gradient_edge(weight).node for weight in weights if weight is not None and weight.requires_grad
    }


def _products(start: Node, parents: Mapping[Node, Sequence[Node]], layer: Observation) -> Iterator[Node]:
    """The products ``phi W^T + b`` of the layer, b its own, with the weight that begins at `start`.

    Not ``z W`` nor ``W W^T``; nor, if the layer has a bias, products without it: these are other uses of the
    weight, which do not count.
    """
    stack = [(start, layer.stores_transposed)]
    while stack:
        node, transposed = stack.pop()
        for above in set(parents.get(node, ())):
            kind = nodes.kind(above)
            operands = [below for below, _ in above.next_functions]
            if kind in operations.PERMUTATIONS:
                stack.append((above, not transposed))
            elif kind in _SAME_NUMBERS:
                stack.append((above, transposed))
            else:
                of_weight = kind == "Convolution" and operands[1] is node
                if kind in operations.MATRIX_PRODUCTS:
                    of_weight = transposed and operands[-1] is node and operands[-2] is not start
                if of_weight and _has_bias(above, parents, layer.module.bias):
                    yield above


def _has_bias(product: Node, parents: Mapping[Node, Sequence[Node]], bias: Any) -> bool:
    """Whether a bias is added to a product; True if that cannot be told, as it has none or is frozen."""
    if bias is None or not bias.requires_grad:
        return True
    begins = get_gradient_edge(bias).node
    stack = [product]
    while stack:
        node = stack.pop()
        if any(_origin(below) is begins for below, _ in node.next_functions):
            return True
        same = (above for above in parents[node] if nodes.kind(above) in _SAME_NUMBERS | {"Add"})
        stack.extend(same if node is product or nodes.kind(node) != "Add" else ())
    return False


def _origin(node: Node | None) -> Node | None:
    """What a node has all its numbers from."""
    while node is not None and nodes.kind(node) in _SAME_NUMBERS:
        node = node.next_functions[0][0]
    return node
