"""Refuses losses that depend on a use of a layer's weight of which there is no record.

Such uses are calls that were not observed, and derivatives through any call of the layer. A derivative has
the weight a second time, beside ``z = lin(phi; W)``: only kappa of the weight itself counts both.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence, Set
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node, get_gradient_edge

from fam_optim.graph import nodes, operations
from fam_optim.graph.reach import same_graph, spread
from fam_optim.layer.kinds import use_type
from fam_optim.layer.record import Observation, recorded_use
from fam_optim.layer.use import Layout, Use, describe

Parents = Mapping[Node, Sequence[Node]]


def check_all_seen(
    parents: Parents, layers: Sequence[Observation | Tensor], uses_of: Sequence[Sequence[Use]]
) -> None:
    """Raises RuntimeError if the loss depends on a call of a layer that was not recorded, on a derivative
    through a call, or on a parameter with a sparse gradient. `uses_of` has the uses found of each layer."""
    calls = {node for node in parents if recorded_use(node)}
    recorded = calls | set(map(_product_of_call, calls))
    checkpoints = [node for node in parents if nodes.is_reentrant_checkpoint(node)]
    weights_of = [_weights(layer, uses) for layer, uses in zip(layers, uses_of, strict=True)]
    every = [weight for weights in weights_of for weight in weights]
    frozen = not all(weight.requires_grad for weight in every)
    constants = defaultdict(list)  # products by the places of their factors, a frozen weight's only trace
    kinds = operations.MATRIX_PRODUCTS | {"Convolution", "ConvolutionBackward"}
    for node in parents if frozen else ():
        for factor in nodes.factors(node) if nodes.kind(node) in kinds else ():
            constants[_place(factor)].append(node)
    # A derivative may have multiplied a frozen weight with constants, which leaves no trace.
    derivative = frozen and any(node.name().count("Backward") > 1 for node in parents)
    by_name: dict[str, list[Node]] = {}
    for node in parents if any(weight.grad_fn is not None for weight in every) else ():
        by_name.setdefault(node.name(), []).append(node)
    for layer, uses, weights in zip(layers, uses_of, weights_of, strict=True):
        if isinstance(layer, Observation):
            layout: Any = use_type(layer.module).layout_of(layer.module, weights[0]) if weights else None
            starts = {get_gradient_edge(weight).node for weight in weights if weight.requires_grad}
            # A weight that is computed at every call may have been computed for another use, too.
            starts |= {n for start in starts for n in by_name.get(start.name(), ()) if same_graph(n, start)}
            products = _of_trained(starts, parents, layout, recorded)
            if any(map(nodes.hides, products)):  # one that feeds a call has an embedding with its weight
                feeding = spread(calls, lambda node: {below for below, _ in node.next_functions} - {None})
                products -= {node for node in feeding if nodes.hides(node)}
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


def _of_trained(starts: Set[Node], parents: Parents, layout: Layout, recorded: Set[Any]) -> set[Node]:
    """Returns the operations that multiply trained weights, which `starts` make, with data: ``phi W^T`` of
    calls that were not `recorded`, and ``delta W`` of derivatives, which multiply with a W that t() has made
    of W^T. ``z W``, which sums over outputs, and ``W W^T`` are other uses. What is not shown counts."""
    found: set[Node] = set()
    copies: set[Node] = set()  # nodes that make copies of the weight, or weights from it
    stack: list[tuple[Node, tuple[Node, ...]]] = [(start, ()) for start in starts]
    while stack:
        node, way = stack.pop()
        copies.add(node)
        for above in set(parents.get(node, ())) - recorded:
            kind, operands = nodes.kind(above), [below for below, _ in above.next_functions]
            position = operands.index(node)
            # Such make another weight, scaled, masked or moved by a step.
            changes = kind in operations.ADDITIONS | {"Mul", "Div"}
            changes = changes and nodes.shape(above, 0).numel() == layout.shape.numel()
            if changes or kind in operations.SAME_NUMBERS:
                stack.append((above, (*way, above)))
            elif kind in operations.MATRIX_PRODUCTS and position >= len(operands) - 2:
                if _sums_over_inputs(way, layout, second=position == len(operands) - 1):
                    found.add(above)
            elif _is_product(above, position, layout):
                found.add(above)
    return {node for node in found if not {factor for factor, _ in node.next_functions[-2:]} <= copies}


def _sums_over_inputs(way: Sequence[Node], layout: Layout, *, second: bool) -> bool:
    """Returns whether a matrix product sums over the inputs of a weight that comes some way to its first or
    second factor; or, in a derivative that torch takes, over its outputs. True if this is not known."""
    swaps = [node for node in way if nodes.kind(node) in operations.PERMUTATIONS]
    by_t = second and len(swaps) >= (not layout.inputs_first) and {nodes.kind(n) for n in swaps} <= {"T"}
    shapes = [nodes.shape(node, 0) for node in way] or [layout.shape]
    if by_t or any(len(shape) != 2 or layout.shape[0] not in shape for shape in shapes):
        return True
    swapped = sum(nodes.order(node, 2) == [1, 0] for node in swaps) % 2 == 1
    return (second != swapped) == layout.inputs_first  # whether it sums over the weight's first axis


def _is_product(node: Node, position: int, layout: Layout) -> bool:
    """Returns whether a node but a matrix product may multiply its operand, a weight, with data."""
    kind = nodes.kind(node)
    if kind == "ConvolutionBackward":  # without a shape it is a derivative in the weight alone
        return position == 2 and bool(nodes.shape(node, 0))
    if kind == "Mul":
        return nodes.shape(node, 0).numel() > layout.shape.numel()
    return nodes.hides(node) or kind == "Trilinear" or (kind in ("Convolution", "Linear") and position == 1)


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
