"""What a loss is linear in: the way down from it through operations that only add, scale and move."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from fam_optim.graph import nodes

if TYPE_CHECKING:
    from collections.abc import Set

    from torch import Tensor
    from torch.autograd.graph import Node

_LINEAR = {
    "View",
    "UnsafeView",
    "ReshapeAlias",
    "Squeeze",
    "Unsqueeze",
    "Clone",
    "ToCopy",
    "Alias",
    nodes.DDP_SINK,
}
_LINEAR |= {
    "Transpose",
    "Permute",
    "T",
    "Slice",
    "Select",
    "Expand",
    "Index",
    "IndexSelect",
    "Gather",
    "Add",
    "Sub",
}
_LINEAR |= {
    "Neg",
    "Sum",
    "Mean",
    "NllLoss",
    "NllLoss2D",
    "Cat",
    "Stack",
    "Unbind",
    "MaskedFill",
    "MaskedSelect",
}
_LINEAR |= {"Where", "Split", "SplitWithSizes"}
_LINEAR_IN_FIRST = {"Div", "KlDiv"}
_LINEAR_IN_EITHER = {"Mul", "Dot", "Mv", "Mm", "Bmm"}


class Descent(NamedTuple):
    """The nodes that a loss was found to be linear in, and whether the coefficients are constants."""

    leaves: list[Node]
    constant: bool


def descend(loss: Tensor, path: Set[Node], ends: Set[Node], leaves: Set[str]) -> Descent | None:
    """The nodes in whose results the loss is linear, as far as it depends on `ends`; None if in others.

    Args:
        leaves: the kinds of nodes that are looked for.
        path: the nodes from which one of `ends` can be reached, and these.
    """
    found, constant = [], True
    root = loss.grad_fn
    assert root is not None
    stack = [(root, loss.output_nr)]
    seen = set(stack)
    while stack:
        node, output = stack.pop()
        kind = nodes.kind(node)
        if kind in leaves:
            found.append(node)
            continue
        if node in ends:  # linear in z itself: no curvature
            continue
        inputs = nodes.inputs_of(node, output)
        on_path = [i for i, (below, _) in enumerate(inputs) if below in path]
        if kind in _LINEAR_IN_FIRST:
            linear = on_path == [0]
        elif kind in _LINEAR_IN_EITHER:
            linear = len(on_path) == 1
        else:
            linear = kind in _LINEAR
        if not linear:
            return None
        for below, its_output in inputs:
            if below is None:
                continue
            if below not in path:
                constant = False
            elif (below, its_output) not in seen:
                seen.add((below, its_output))
                stack.append((below, its_output))
    return Descent(found, constant)
