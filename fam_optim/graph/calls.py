"""What a layer's call leaves on the graph: the product with its weight, and a derivative through that."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fam_optim.graph import nodes

if TYPE_CHECKING:
    import torch
    from torch.autograd.graph import Node


def weight_of_convolution(node: Node) -> tuple[Node, int] | None:
    """What made the weight, if the node is a convolution whose weight has a derivative."""
    if nodes.kind(node) != "Convolution":
        return None
    below, output = node.next_functions[1]
    return None if below is None else (below, output)


def is_unscaled(node: Node) -> bool:
    """Whether a matrix product, with a bias or without, comes without a factor of its own."""
    return nodes.kind(node) == "Mm" or bool(nodes.kept(node, "alpha") == 1)


def first_factor(node: Node) -> torch.Tensor:
    """What an Addmm or Mm multiplies with its second factor, whose derivative needs it."""
    factor: torch.Tensor = (
        nodes.kept(node, "mat1") if nodes.kind(node) == "Addmm" else nodes.kept(node, "self")
    )
    return factor


def product_of_call(end: Node) -> Node | None:
    """The product with the weight below the node that makes a layer's output; None if it is not found."""
    node: Node | None = end
    # The bias is added by itself where the input is not contiguous.
    while node is not None and nodes.kind(node) in ("View", "UnsafeView", "Squeeze", "ReshapeAlias", "Add"):
        node = node.next_functions[0][0]
    return node if node is not None and nodes.kind(node) in ("Addmm", "Mm", "Convolution") else None


def transposed_weight(product: Node) -> Node | None:
    """The transpose that F.linear makes of its weight, anew in every call, if the weight has a derivative."""
    return None if nodes.kind(product) == "Convolution" else product.next_functions[-1][0]


def is_derivative_through(node: Any, product: Node, weight: torch.Tensor) -> bool:
    """Whether `node` belongs to a derivative, taken in the forward, with respect to what `product` multiplies
    with `weight`: there the weight counts beside the product."""
    if nodes.kind(product) == "Convolution":
        # A derivative with respect to the weight alone does not contain it; its first result has no shape.
        through = node.name().startswith("ConvolutionBackwardBackward") and len(nodes.shape(node, 0)) > 0
        return through and node.next_functions[1:3] == product.next_functions[:2]
    if transposed_weight(product) is not None:
        return node is not product and any(n is transposed_weight(product) for n, _ in node.next_functions)
    # A frozen weight leaves no trace but the numbers that the derivative was multiplied with.
    if nodes.kind(node) != "Mm" or node.next_functions[1][0] is not None:
        return nodes.is_derivative(node)
    other = nodes.kept(node, "mat2")
    if other is None or other.data_ptr() != weight.data_ptr():
        return False
    return bool(other.shape == weight.shape and other.stride() == weight.stride())


def may_be_derivative(node: Node) -> bool:
    """Whether `node` is of a derivative, or multiplies with a constant, as one of a frozen layer does."""
    return nodes.is_derivative(node) or (node.name().startswith("Mm") and node.next_functions[1][0] is None)


def computed_alike(left: torch.Tensor, right: torch.Tensor) -> bool:
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
