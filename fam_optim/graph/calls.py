"""What a layer's call leaves on the graph: the product with its weight, and whether two were made alike."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from fam_optim.graph import nodes

if TYPE_CHECKING:
    from torch.autograd.graph import Node


def weight_of_convolution(node: Node) -> tuple[Node, int] | None:
    """What made the weight, if the node is a convolution whose weight has a derivative."""
    if nodes.kind(node) != "Convolution":
        return None
    below, output = node.next_functions[1]
    return None if below is None else (below, output)


def first_factor(node: Node) -> Any:
    """What an Addmm or Mm multiplies with its second factor, whose derivative needs it: a tensor."""
    return nodes.kept(node, "mat1") if nodes.kind(node) == "Addmm" else nodes.kept(node, "self")


def product_of_call(end: Node) -> Node | None:
    """The product with the weight below the node that makes a layer's output; None if it is not found."""
    node: Node | None = end
    # The bias is added by itself where the input is not contiguous.
    while node is not None and nodes.kind(node) in ("View", "UnsafeView", "Squeeze", "ReshapeAlias", "Add"):
        node = node.next_functions[0][0]
    return node if node is not None and nodes.kind(node) in ("Addmm", "Mm", "Convolution") else None


_SECOND_FACTORS = {
    "Mm": ("mat2", 1),
    "Bmm": ("mat2", 1),
    "Addmm": ("mat2", 2),
    "Convolution": ("weight", 1),
    "ConvolutionBackward": ("weight", 2),
}
"""What a product keeps its second factor as, and which of its operands that is."""


def constant_factor(node: Node) -> torch.Tensor | None:
    """The second factor of a product, if that is a constant."""
    name, position = _SECOND_FACTORS.get(nodes.kind(node), ("", 0))
    if not name or node.next_functions[position][0] is not None:
        return None
    return nodes.at_hand(node, name)


def place(t: torch.Tensor) -> int | None:
    """Where a tensor's numbers begin; None of a tensor that holds them in others (sharded, quantised)."""
    return t.data_ptr() if type(t.data) is torch.Tensor else None


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
