"""Proof, from the graph alone, that groups of rows do not interact between a layer and the loss.

Split every tensor on the way into N equal runs of numbers, one after the other in the order of their
indices, and call run i that of group i. Two facts make the proof: elementwise operations, products with
something else on the last axis, normalisations and sums over later axes, and new views make run i of their
result from run i of their operands; and the loss is a sum over groups if it is reached by sums, by losses
that add up their entries, and by what is linear in single numbers. Nothing is looked at but names, shapes
and axes.

What is not recognised proves nothing, and is tested numerically (`rows`). A user's autograd.Function is
never recognised, whatever it is called.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from fam_optim.graph import nodes

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch
    from torch.autograd.graph import Node

    Shape = Sequence[int]

_LINEAR = {"Add", "Sub", "Rsub", "Neg", "View", "UnsafeView", "ReshapeAlias", "Squeeze", "Unsqueeze", "Clone"}
_LINEAR |= {"ToCopy", "Alias", "Sum", "Mean", "Expand", nodes.DDP_SINK}
_LOSSES = {"NllLoss", "NllLoss2D", "MseLoss", "SmoothL1Loss", "HuberLoss", "SoftMarginLoss"}
_LOSSES |= {"BinaryCrossEntropy", "BinaryCrossEntropyWithLogits", "KlDiv"}
_ELEMENTWISE = {
    *(
        "Add",
        "Sub",
        "Rsub",
        "Mul",
        "Div",
        "Neg",
        "Pow",
        "Square",
        "Sqrt",
        "Rsqrt",
        "Reciprocal",
        "Abs",
        "Sign",
    ),
    *("Exp", "Expm1", "Log", "Log1P", "Log2", "Sin", "Cos", "Tanh", "Sigmoid", "LogSigmoid", "Erf", "Atan"),
    *("Relu", "LeakyRelu", "Elu", "Gelu", "Silu", "Mish", "Hardtanh", "Hardswish", "Hardsigmoid", "Softplus"),
    *("Threshold", "Clamp", "ClampMin", "ClampMax", "Minimum", "Maximum", "Where", "MaskedFill", "Lerp"),
    *("Addcmul", "Addcdiv", "NativeDropout", "Softshrink", "Hardshrink", "Xlogy", "Fmod"),
}
_SAME_RUNS = {"View", "UnsafeView", "ReshapeAlias", "Clone", "ToCopy", "Alias", "Squeeze", "Unsqueeze"}
_SAME_RUNS |= {nodes.DDP_SINK}


def independent(between: frozenset[Node], ends: frozenset[Node], groups: int) -> bool:
    """Whether the graph shows that the `groups` runs of z do not interact; False proves nothing.

    z is the output of a layer, or of several uses of several layers, each of as many runs.

    Args:
        between: the nodes between z and the loss.
        ends: those that make z.
        groups: how many runs.

    Cost: a few microseconds per node between, no arithmetic.
    """
    path = between | ends
    return all(_preserves(node, path, groups) for node in between)


def _preserves(node: Node, path: frozenset[Node], groups: int) -> bool:
    """Whether one operation keeps groups apart; or is a part of the sum that the loss is over them."""
    inputs = [
        (position, nodes.shape(below, output))
        for position, (below, output) in enumerate(node.next_functions)
        if below in path and below is not None
    ]
    kind, result = nodes.kind(node), nodes.shape(node, 0)
    if math.prod(result) == 1:
        return _adds(node, kind, inputs, groups)
    return all(_maps_runs(node, kind, position, operand, result, groups) for position, operand in inputs)


def _adds(node: Node, kind: str, inputs: list[tuple[int, torch.Size]], groups: int) -> bool:
    """Whether a single number is linear in the single numbers, and additive in the runs, it is made of."""
    if kind in ("Mul", "Div"):
        return len(inputs) == 1 and math.prod(inputs[0][1]) == 1 and (kind == "Mul" or inputs[0][0] == 0)
    if kind in _LOSSES:  # several operands only where entry meets entry, none of them broadcast
        return len({operand for _, operand in inputs}) == 1 and _leading(inputs[0][1], groups) is not None
    if kind not in _LINEAR:
        return False
    return all(
        math.prod(operand) == 1 or (kind in ("Sum", "Mean") and _leading(operand, groups) is not None)
        for _, operand in inputs
    )


def _maps_runs(node: Node, kind: str, position: int, operand: Shape, result: Shape, groups: int) -> bool:
    """Whether run i of the result is made of run i of the operand, and no other."""
    before, after = _leading(operand, groups), _leading(result, groups)
    if before is None or after is None:
        return False
    if kind in _SAME_RUNS:
        return math.prod(operand) == math.prod(result)
    same_leading = tuple(operand[:before]) == tuple(result[:before]) and before == after
    if not same_leading:
        return False
    if kind in _ELEMENTWISE or kind == "Expand":
        return len(operand) == len(result)
    if kind in _LOSSES and operand == result:  # reduction="none"
        return True
    rule = _RULES.get(kind)
    return rule is not None and rule(node, position, len(operand), before)


def _leading(shape: Shape, groups: int) -> int | None:
    """How many leading axes enumerate the runs; None if no number of them does."""
    size = 1
    for count, length in enumerate(shape, start=1):
        size *= length
        if size % groups == 0:
            return count
    return None


# Operations with axes of their own. A rule is given the node, which of its operands is on the way, and of
# that the number of dimensions and how many of them enumerate the runs.


def _by_first_axis(node: Node, position: int, dimensions: int, leading: int) -> bool:
    """``x @ w`` with x on the way; convolutions, pools, GroupNorm: what the first axis counts is apart."""
    return position == 0 and leading == 1


def _axes_behind(name: str) -> Callable[[Node, int, int, int], bool]:
    """Operations along the axes that the node keeps as `name`: behind the leading ones."""
    return lambda node, position, dimensions, leading: min(nodes.axes(node, name, dimensions)) >= leading


def _permutes_behind(node: Node, position: int, dimensions: int, leading: int) -> bool:
    order = nodes.order(node, dimensions)
    return order[:leading] == list(range(leading))


def _transposes_behind(node: Node, position: int, dimensions: int, leading: int) -> bool:
    return min(nodes.axis(node, name, dimensions) for name in ("dim0", "dim1")) >= leading


def _layer_norm(node: Node, position: int, dimensions: int, leading: int) -> bool:
    normalised = len(node._saved_normalized_shape)  # type: ignore[attr-defined]
    return position == 0 and leading <= dimensions - normalised


_RULES: dict[str, Callable[[Node, int, int, int], bool]] = {
    **dict.fromkeys(("NllLoss", "NllLoss2D"), _by_first_axis),
    "Addmm": lambda node, position, dimensions, leading: position == 1 and leading == 1,
    **dict.fromkeys(("Mm", "Mv", "Convolution"), _by_first_axis),
    **dict.fromkeys(("MaxPool2DWithIndices", "AvgPool2D", "AdaptiveAvgPool2D"), _by_first_axis),
    **dict.fromkeys(("UpsampleNearest2D", "UpsampleBilinear2D", "NativeGroupNorm"), _by_first_axis),
    "Bmm": lambda node, position, dimensions, leading: leading == 1,  # a product of its own for every run
    "Baddbmm": lambda node, position, dimensions, leading: position > 0 and leading == 1,
    **dict.fromkeys(
        ("Softmax", "LogSoftmax", "Cumsum", "Gather", "Sum", "Mean", "Prod"), _axes_behind("dim")
    ),
    **dict.fromkeys(("Logsumexp", "Amax", "Amin", "Max", "Min", "Var", "Std"), _axes_behind("dim")),
    **dict.fromkeys(("LinalgVectorNorm", "Select", "Slice", "Cat", "Split", "Unbind"), _axes_behind("dim")),
    "Permute": _permutes_behind,
    "Transpose": _transposes_behind,
    "NativeLayerNorm": _layer_norm,
    **dict.fromkeys(
        ("NativeBatchNorm", "CudnnBatchNorm", "MiopenBatchNorm"),
        lambda node, position, dimensions, leading: position == 0 and not nodes.normalises_over_batch(node),
    ),
}
