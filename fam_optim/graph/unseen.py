"""Uses of a layer's weight that left no record: a loss that depends on them beside recorded calls is refused.

Such are calls that were not observed, and derivatives through any call of the layer: there the weight counts
beside ``z = lin(phi; W)``, and only the weight sees both.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch.autograd.graph import get_gradient_edge

from fam_optim.graph import calls, nodes, operations
from fam_optim.layer.record import Observation, recorded_use
from fam_optim.layer.use import describe

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence, Set

    from torch import Tensor
    from torch.autograd.graph import Node

    from fam_optim.layer.use import Use


_DERIVATIVE = "derivative"
_SAME_NUMBERS = operations.VIEWS | {"Expand", "torch::autograd::Identity"}


def check_all_seen(
    parents: Mapping[Node, Sequence[Node]], uses_of: Sequence[tuple[Observation | Tensor, Sequence[Use]]]
) -> None:
    """Raises RuntimeError if the loss depends on a call of a layer that was not recorded, on a derivative
    through one, or on a parameter whose gradient is sparse.

    Args:
        parents: the nodes that use a node's result, for every node of the loss's graph.
        uses_of: the layers, and their uses that were found.
    """
    recorded = _recorded_products(parents)
    checkpoints = [node for node in parents if nodes.is_reentrant_checkpoint(node)]
    weights_of = [_weights(layer, uses) if isinstance(layer, Observation) else [] for layer, uses in uses_of]
    every = [weight for weights in weights_of for weight in weights]
    constants = {} if all(weight.requires_grad for weight in every) else _constant_factors(parents)
    by_name = {} if all(weight.grad_fn is None for weight in every) else _by_name(parents)
    for (layer, uses), weights in zip(uses_of, weights_of, strict=True):
        if isinstance(layer, Observation):
            transposed = layer.stores_transposed
            found = {
                **_of_trained(_starts(weights, by_name), parents, layer),
                **_of_frozen(weights, constants, transposed),
            }
            unseen = [through for product, through in found.items() if product not in recorded]
            if any(unseen) or (_DERIVATIVE in constants and uses and not weights[0].requires_grad):
                raise RuntimeError(_derivative(layer))
            if unseen or any(map(layer.called_within, checkpoints)):
                raise RuntimeError(_unseen(layer))
        elif uses and any(map(nodes.has_sparse_gradient, parents[get_gradient_edge(layer).node])):
            raise RuntimeError(
                f"`layer`, a {describe(layer)}, has a sparse gradient, which has no second derivative. Build "
                "the embedding with sparse=False."
            )


def _derivative(layer: Observation) -> str:
    return (
        "`loss` contains a derivative (a gradient penalty, a force, a residual of a differential equation) "
        f"that was taken through `layer` {describe(layer.module)}, whose weight counts beside its output; or "
        "it multiplies with weight.t(), which looks the same (write z @ weight). Pass the weight itself, an "
        "nn.Parameter that requires gradients, as `layer` with mode='hutchinson' or mode='full': these count "
        "every use of it."
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


def _weights(layer: Observation, uses: Sequence[Use]) -> list[Tensor]:
    """The weights that the layer's calls were made with; its own if there were none."""
    own = layer.module._parameters.get("weight")
    return [use.weight for use in uses] or ([] if own is None else [own])


def _starts(weights: Sequence[Tensor], by_name: Mapping[str, Sequence[Node]]) -> set[Node]:
    """Where trained weights begin; of those that are computed at every call, wherever this was done alike."""
    starts = {get_gradient_edge(weight).node for weight in weights if weight.requires_grad}
    alike = {n for start in starts for n in by_name.get(start.name(), ()) if calls.same_graph(n, start)}
    return starts | alike


def _by_name(graph: Iterable[Node]) -> dict[str, list[Node]]:
    found: dict[str, list[Node]] = {}
    for node in graph:
        if not nodes.is_leaf(node):
            found.setdefault(node.name(), []).append(node)
    return found


def _of_trained(
    starts: Set[Node], parents: Mapping[Node, Sequence[Node]], layer: Observation
) -> dict[Node, bool]:
    """Products ``phi W^T`` of weights that begin at `starts`, as the layer takes them, and ``delta W`` as a
    derivative through it does, with whether they are such.

    A call's W^T is made by t(), and what a derivative takes from that by more. Written by hand, W.T, a
    product is a call if the layer's bias is added. Not ``z W`` nor ``W W^T``: other uses, which do not count.
    """
    found = {}
    of_call = 0 if layer.stores_transposed else 1  # how many t() it takes
    stack: list[tuple[Node, tuple[str, ...]]] = [(start, ()) for start in starts]
    while stack:
        node, way = stack.pop()
        for above in set(parents.get(node, ())):
            kind = nodes.kind(above)
            operands = [below for below, _ in above.next_functions]
            if kind in operations.PERMUTATIONS:
                stack.append((above, (*way, kind)))
            elif kind in _SAME_NUMBERS:
                stack.append((above, way))
            elif kind == "Convolution" and operands[1] is node:
                found[above] = False
            elif calls.is_derivative_of_convolution(above) and operands[2] is node:
                found[above] = True
            elif kind in operations.MATRIX_PRODUCTS and operands[-1] is node and operands[-2] not in starts:
                by_torch = len(way) >= of_call and set(way) <= {"T"}
                as_called = len(way) % 2 == of_call
                if by_torch or (as_called and _has_bias(above, parents, layer.module.bias)):
                    found[above] = len(way) > of_call
    return found


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


def _of_frozen(
    weights: Sequence[Tensor], constants: Mapping[object, Sequence[Node]], stored_transposed: bool
) -> dict[Node, bool]:
    """The same of frozen weights, which leave no trace but where their numbers lie."""
    found = {}
    for weight in weights:
        for node in () if weight.requires_grad else constants.get(calls.place(weight), ()):
            factor = calls.constant_factor(node)
            assert factor is not None
            as_stored = factor.shape == weight.shape and factor.stride() == weight.stride()
            found[node] = nodes.kind(node) != "Convolution" and as_stored != stored_transposed
    return found


def _constant_factors(parents: Iterable[Node]) -> dict[object, list[Node]]:
    """Products with a constant, by where its numbers lie; by _DERIVATIVE those of derivatives, which may have
    multiplied a frozen weight with constants."""
    found: dict[object, list[Node]] = {}
    for node in parents:
        if nodes.is_derivative(node):
            found.setdefault(_DERIVATIVE, []).append(node)
        factor = calls.constant_factor(node)
        if factor is not None:
            found.setdefault(calls.place(factor), []).append(node)
    return found
