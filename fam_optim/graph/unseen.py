"""Uses of a layer's weight that left no record: a loss that depends on them beside recorded calls is refused.

Such are calls that were not observed, and derivatives through any call of the layer: there the weight counts
beside ``z = lin(phi; W)``, and only the weight sees both.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.autograd.graph import get_gradient_edge

from fam_optim.graph import calls, nodes, operations
from fam_optim.layer.record import Observation, recorded_use
from fam_optim.layer.use import describe

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch import Tensor
    from torch.autograd.graph import Node

    from fam_optim.layer.use import Use


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
    for layer, uses in uses_of:
        if isinstance(layer, Observation):
            if any(through for node, through in _products(layer, uses, parents) if node not in recorded):
                raise RuntimeError(_derivative(layer))
            unseen = any(node not in recorded for node, _ in _products(layer, uses, parents))
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


def _products(
    layer: Observation, uses: Sequence[Use], parents: Mapping[Node, Sequence[Node]]
) -> Iterator[tuple[Node, bool]]:
    """The products with the layer's weight, and whether a derivative through the layer takes such.

    Those of its own weight, or of the weights that its calls were made with.
    """
    own = layer.module._parameters.get("weight")
    weights: list[Tensor | None] = [use.weight for use in uses] or [own]
    starts: set[Node] = set()
    for weight in weights:
        if weight is not None and weight.requires_grad:
            starts.add(get_gradient_edge(weight).node)
        elif weight is not None:
            yield from _with_constant(weight, parents, layer.stores_transposed)
    for start in starts:
        yield from _from(start, parents, layer.stores_transposed)


def _from(
    start: Node, parents: Mapping[Node, Sequence[Node]], stored_transposed: bool
) -> Iterator[tuple[Node, bool]]:
    """Products ``phi W^T`` with the weight W that begins at `start`, as the layer takes them, and such as a
    derivative takes, ``delta W``.

    W is what F.linear makes by t(), made back by another. Not ``z W`` nor ``W W^T``: these are other uses of
    the weight, which do not count.
    """
    stack: list[tuple[Node, tuple[str, ...]]] = [(start, ())]
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
                yield above, False
            elif calls.is_derivative_of_convolution(above) and operands[2] is node:
                yield above, True
            elif kind in operations.MATRIX_PRODUCTS and operands[-1] is node and operands[-2] is not start:
                as_called = len(way) % 2 != stored_transposed
                if as_called or stored_transposed or way == ("T", "T"):
                    yield above, not as_called


def _with_constant(
    weight: Tensor, parents: Mapping[Node, Sequence[Node]], stored_transposed: bool
) -> Iterator[tuple[Node, bool]]:
    """The same of a frozen weight, which leaves no trace but where its numbers lie; or none, if a derivative
    multiplied it with constants."""
    for node in parents:
        if nodes.is_derivative(node):
            yield node, True
        factor = calls.constant_factor(node)
        if factor is not None and factor.data_ptr() == weight.data_ptr():
            as_stored = factor.shape == weight.shape and factor.stride() == weight.stride()
            is_convolution = nodes.kind(node) == "Convolution"
            yield node, not is_convolution and as_stored != stored_transposed
