"""Refuses losses that depend on a use of a layer's weight of which there is no record.

Such uses are calls that were not observed, and derivatives through any call of the layer. A derivative has
the weight a second time, beside ``z = lin(phi; W)``: only kappa of the weight itself counts both.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence, Set

import torch
from torch import Tensor
from torch.autograd.graph import Node, get_gradient_edge

from fam_optim.graph import nodes, operations
from fam_optim.graph.reach import same_graph
from fam_optim.layer.kinds import use_type
from fam_optim.layer.record import Observation, recorded_use
from fam_optim.layer.use import Conv1DUse, Use, describe

Parents = Mapping[Node, Sequence[Node]]

_SAME_NUMBERS = operations.VIEWS | {"Expand", "torch::autograd::Identity"}


def check_all_seen(
    parents: Parents, layers: Sequence[Observation | Tensor], uses_of: Sequence[Sequence[Use]]
) -> None:
    """Raises RuntimeError if the loss depends on a call of a layer that was not recorded, on a derivative
    through a call, or on a parameter with a sparse gradient. `uses_of` has the uses found of each layer."""
    recorded = {_product_of_call(node) for node in parents if recorded_use(node)}
    checkpoints = [node for node in parents if nodes.is_reentrant_checkpoint(node)]
    weights_of = [_weights(layer, uses) for layer, uses in zip(layers, uses_of, strict=True)]
    every = [weight for weights in weights_of for weight in weights]
    frozen = not all(weight.requires_grad for weight in every)
    constants = _constant_factors(parents if frozen else ())
    # A derivative may have multiplied a frozen weight with constants, which leaves no trace.
    derivative = frozen and any(node.name().count("Backward") > 1 for node in parents)
    by_name: dict[str, list[Node]] = {}
    for node in parents if any(weight.grad_fn is not None for weight in every) else ():
        by_name.setdefault(node.name(), []).append(node)
    for layer, uses, weights in zip(layers, uses_of, weights_of, strict=True):
        if isinstance(layer, Observation):
            transposed = use_type(layer.module) is Conv1DUse  # stores W^T and multiplies with that
            products = _of_trained(_starts(weights, by_name), parents, transposed)
            products.update(*(constants[_place(weight)] for weight in weights if not weight.requires_grad))
            hidden = derivative and uses and not weights[0].requires_grad
            if hidden or products - recorded or any(map(layer.called_within, checkpoints)):
                raise RuntimeError(_UNSEEN.format(describe(layer.module)))
        elif uses and any(map(nodes.has_sparse_gradient, parents[get_gradient_edge(layer).node])):
            raise RuntimeError(
                f"`layer`, a {describe(layer)}, has a sparse gradient. Build the embedding with sparse=False."
            )


_UNSEEN = (
    "the weight of `layer` {0} counts in `loss` beside its observed calls: in a derivative that was taken "
    "through `layer` {0} (a gradient penalty, a force, a Jacobian), or in a call that was not observed "
    "(layer.forward(...), a function with the weight, weight.t(), torch.func, reentrant checkpoints, a "
    "module that shares the weight, a forward before the last step). Pass the weight itself, an nn.Parameter "
    "that requires gradients, with mode='hutchinson' or mode='full', which count every use. (Without a "
    "derivative: call the layer as a module, checkpoint with use_reentrant=False, name all that share it.)"
)


def _weights(layer: Observation | Tensor, uses: Sequence[Use]) -> list[Tensor]:
    """Returns the weights that a module's calls were made with; the module's own if there were no calls."""
    if not isinstance(layer, Observation):
        return []
    own = layer.module._parameters.get("weight")
    return [use.weight for use in uses] or ([] if own is None else [own])


def _starts(weights: Sequence[Tensor], by_name: Mapping[str, Sequence[Node]]) -> set[Node]:
    """Returns the nodes that make trained weights, one that is computed at every call in the calls' way."""
    starts = {get_gradient_edge(weight).node for weight in weights if weight.requires_grad}
    alike = {n for start in starts for n in by_name.get(start.name(), ()) if same_graph(n, start)}
    return starts | alike


def _of_trained(starts: Set[Node], parents: Parents, stored_transposed: bool) -> set[Node]:
    """Returns the products with trained weights: ``phi W^T`` of the layer's calls, and ``delta W`` of
    derivatives through it. `starts` are the nodes that make the weights. A call makes W^T by t(), and a
    derivative makes W from that by more. ``z W`` and ``W W^T`` are other uses, which do not count."""
    found: set[Node] = set()
    of_call = 0 if stored_transposed else 1  # how many t() a call takes
    copies: set[Node] = set()  # nodes that make copies of the weight
    stack: list[tuple[Node, tuple[str, ...]]] = [(start, ()) for start in starts]
    while stack:
        node, way = stack.pop()
        copies.add(node)
        for above in set(parents.get(node, ())):
            kind = nodes.kind(above)
            operands = [below for below, _ in above.next_functions]
            if kind in operations.PERMUTATIONS:
                stack.append((above, (*way, kind)))
            elif kind in _SAME_NUMBERS:
                stack.append((above, way))
            elif kind == "Convolution" and operands[1] is node:
                found.add(above)
            elif kind == "ConvolutionBackward" and operands[2] is node and nodes.shape(above, 0):
                found.add(above)  # no shape: a derivative in the weight alone
            elif kind in operations.MATRIX_PRODUCTS and operands[-1] is node:
                by_torch = len(way) >= of_call and set(way) <= {"T"}
                if by_torch or len(way) % 2 == of_call:
                    found.add(above)
    products = operations.MATRIX_PRODUCTS
    return {n for n in found if nodes.kind(n) not in products or n.next_functions[-2][0] not in copies}


_SECOND_FACTORS = {
    "Mm": ("mat2", 1),
    "Bmm": ("mat2", 1),
    "Addmm": ("mat2", 2),
    "Convolution": ("weight", 1),
    "ConvolutionBackward": ("weight", 2),
}
"""By kind of product: the name by which it keeps its second factor, and that operand's position."""


def _constant_factors(graph: Iterable[Node]) -> dict[int | None, list[Node]]:
    """Returns products with a constant second factor by its place in memory, a frozen weight's only trace."""
    found = defaultdict(list)
    for node in graph:
        name, position = _SECOND_FACTORS.get(nodes.kind(node), ("", 0))
        if name and node.next_functions[position][0] is None:
            factor = nodes.at_hand(node, name)
            if factor is not None:
                found[_place(factor)].append(node)
    return found


def _place(t: Tensor) -> int | None:
    """Returns where a tensor's numbers begin; None if other tensors hold them (sharded, quantised)."""
    return t.data_ptr() if type(t.data) is torch.Tensor else None


def _product_of_call(end: Node) -> Node | None:
    """Returns the product with the weight below the node that makes a layer's output; None if not found."""
    node: Node | None = end
    # Where the input is not contiguous, a node of its own adds the bias.
    while node is not None and nodes.kind(node) in ("View", "UnsafeView", "Squeeze", "ReshapeAlias", "Add"):
        node = node.next_functions[0][0]
    return node if node is not None and nodes.kind(node) in ("Addmm", "Mm", "Convolution") else None
