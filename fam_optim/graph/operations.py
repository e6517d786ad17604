"""Tables by kind of node: which operations are linear, and along which axes they keep entries apart."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch.autograd.graph import Node

from fam_optim.graph import nodes

Shape = Sequence[int]
Rule = Callable[["_At"], int | None]


def _kinds(names: str) -> set[str]:
    return set(names.split())


VIEWS = _kinds("View UnsafeView ReshapeAlias Squeeze Unsqueeze Clone ToCopy Alias torch::autograd::Identity")
VIEWS |= {nodes.DDP_SINK}
"""Operations that keep all numbers and their order and may change the shape."""

PERMUTATIONS = _kinds("Permute Transpose T")

SAME_NUMBERS = VIEWS | PERMUTATIONS | {"Expand"}
"""Operations that keep all numbers and may change their order and repeat them."""

MOVES = VIEWS | PERMUTATIONS | _kinds("Expand Index Flip Roll")
MOVES |= _kinds("Slice Select Split SplitWithSizes UnsafeSplit Unbind IndexSelect")
"""Operations that only copy entries of the operand, alike at every place along an axis that is kept apart."""

ADDITIONS = _kinds("Add Sub Rsub Neg")
PRODUCTS = _kinds("Mul Dot Mv Mm Bmm")
MATRIX_PRODUCTS = _kinds("Addmm Mm Bmm Mv Addmv Addbmm Baddbmm SparseAddmm")
"""Products whose two factors are the last operands."""

LINEAR = MOVES | ADDITIONS
LINEAR |= _kinds(
    """Sum Nansum Mean NllLoss NllLoss2D Cat Stack MaskedFill MaskedSelect Where Gather Cumsum Repeat Trace
    Diagonal Tril Triu ConstantPadNd IndexAdd IndexPut IndexCopy ScatterAdd torch::autograd::CopyBackwards"""
)

ELEMENTWISE = ADDITIONS | _kinds(
    """Mul Div Pow Sqrt Rsqrt Reciprocal Abs Sgn Sign Exp Exp2 Expm1 Log Log10 Log1P Log2 Logit Sin Cos Tan
    Asin Acos Atan Atan2 Sinh Cosh Tanh Sigmoid LogSigmoid Erf Erfc Sinc Relu LeakyRelu PreluKernel Elu Celu
    Gelu Silu Mish Hardtanh Hardswish Hardsigmoid Softplus Threshold RreluWithNoise Clamp ClampMin ClampMax
    Minimum Maximum Where MaskedFill Lerp Addcmul Addcdiv NativeDropout Softshrink Hardshrink Xlogy Fmod
    Remainder NanToNum Tril Triu Expand Logaddexp Hypot"""
)
"""Operations that work entry by entry. Operands are repeated along axes of length 1."""

ENTRYWISE_LOSSES = _kinds("MseLoss SmoothL1Loss HuberLoss SoftMarginLoss BinaryCrossEntropy KlDiv")
ENTRYWISE_LOSSES |= {"BinaryCrossEntropyWithLogits"}
"""Losses of every entry by itself, or their sum or mean."""

DISTANCES = ENTRYWISE_LOSSES | _kinds("LogSoftmax Logsumexp Pow Sqrt Abs LinalgVectorNorm Norm Dist Cdist")
DISTANCES |= _kinds("CdistForward EuclideanDist Pdist Hypot Std Var StdMean VarMean LogSigmoid CtcLoss")
DISTANCES |= _kinds("MultiMarginLoss MultilabelMarginLoss LinalgSvd")
"""Losses, norms, distances and spreads, and the last steps of such that are written out."""

PROBABILITIES = _kinds("Softmax SafeSoftmax Sigmoid Exp")
"""Operations that make probabilities, perhaps of others that sum to them; their logarithm is a loss."""

PICKS = _kinds("Max Min Maximum Minimum Amax Amin Aminmax Median Nanmedian Kthvalue Sort Topk Cummax Cummin")
"""Operations that pick entries of the operand by their size."""


def is_linear(kind: str, positions: Sequence[int]) -> bool:
    """Returns whether an operation is linear in its operands at `positions` together, the others fixed."""
    if kind in ("Div", "KlDiv"):
        return list(positions) == [0]
    if kind == "Lerp":
        return 2 not in positions
    if kind in PRODUCTS:
        return len(positions) == 1
    return kind in LINEAR


def moved(
    node: Node, kind: str, position: int, operand: Shape, result: Shape, stride: int, length: int
) -> int | None:
    """Returns which stride a digit of the operand at `position` has in the operation's result; None if the
    operation may lose the digit. The digit of entry e of a tensor, in order, is ``e // stride % length``. An
    operation keeps it if every entry of the result is computed only from entries with the same digit."""
    if kind in VIEWS:
        return stride if math.prod(operand) == math.prod(result) else None
    elementwise = kind in ELEMENTWISE or kind in ENTRYWISE_LOSSES
    if elementwise and tuple(operand) == tuple(result):
        return stride
    place = axis_of_digit(operand, stride, length)
    rule: Rule | None = _aligned if elementwise else _RULES.get(kind)
    if place is None or rule is None:
        return None
    axis, inner = place
    to = rule(_At(node, position, axis, operand, result))
    if to is None or not 0 <= to < len(result) or result[to] != operand[axis]:
        return None
    return inner * math.prod(result[to + 1 :])


def axis_of_digit(shape: Shape, stride: int, length: int) -> tuple[int, int] | None:
    """Returns the axis along which a digit lies and its stride there; None if it lies along several axes."""
    behind = 1
    for axis in reversed(range(len(shape))):
        if stride < behind * shape[axis]:
            inner, rest = divmod(stride, behind)
            return (axis, inner) if rest == 0 and shape[axis] % (inner * length) == 0 else None
        behind *= shape[axis]
    return None


# A rule returns the axis of the result that follows an axis of an operand entry by entry; None if none does.


class _At(NamedTuple):
    """An axis of the operand at `position` of an operation, and the shapes of operand and result."""

    node: Node
    position: int
    axis: int
    operand: Shape
    result: Shape


def _aligned(at: _At) -> int:
    return at.axis + len(at.result) - len(at.operand)


def _beside(at: _At) -> int | None:
    """Rule of operations along some axes, which leave the other axes as they are."""
    along = nodes.axes(at.node, len(at.operand))
    if at.axis in along:
        return None
    return at.axis if len(at.result) == len(at.operand) else at.axis - sum(a < at.axis for a in along)


def _indexed(at: _At) -> int | None:
    """Rule of ``x[:, index]``, which leaves the axes in front of and behind the picked ones as they are."""
    picked = nodes.picked_axes(at.node)
    if at.axis < picked.start:
        return at.axis
    return _aligned(at) if at.axis >= picked.stop else None


def _matrix_product(at: _At) -> int | None:
    """Rule of products of the last two operands, summed over the last axis of the first of these and the last
    but one of the second. An operand before them is added."""
    from_end = len(at.node.next_functions) - at.position
    if from_end > 2:
        return _aligned(at)
    return None if at.axis == len(at.operand) - (1 if from_end == 2 else 2) else at.axis


def _but_the_last(at: _At, several: int) -> int | None:
    """Rule of operations along the last axes, `several` of them, which leave the others as they are."""
    return at.axis if at.axis < len(at.operand) - several else None


_BY_RULE: tuple[tuple[str, Rule], ...] = (
    ("Repeat", _aligned),
    ("Stack", lambda at: at.axis + (at.axis >= min(nodes.axes(at.node, len(at.result))))),
    ("Index", _indexed),
    ("Permute Transpose T", lambda at: nodes.order(at.node, len(at.operand)).index(at.axis)),
    ("ConstantPadNd", lambda at: _but_the_last(at, len(nodes.kept(at.node, "pad")) // 2)),
    ("NllLoss2D", lambda at: {0: 0, 2: 1, 3: 2}.get(at.axis)),
    ("Mm Addmm Bmm Baddbmm", _matrix_product),
    (
        """Slice Select Split SplitWithSizes UnsafeSplit Unbind IndexSelect Flip Roll Softmax SafeSoftmax
        LogSoftmax Cumsum Cumprod Gather Sum Mean Prod Cat Glu Logsumexp Amax Amin Max Min Var Std
        LinalgVectorNorm Norm Sort Topk""",
        _beside,
    ),
    (  # these compute every entry along the first axis by itself
        """Convolution NativeGroupNorm Im2Col Col2Im PixelShuffle PixelUnshuffle MaxPool2DWithIndices
        MaxPool3DWithIndices AvgPool2D AvgPool3D AdaptiveAvgPool2D AdaptiveAvgPool3D AdaptiveMaxPool2D
        AdaptiveMaxPool3D UpsampleNearest1D UpsampleNearest2D UpsampleNearest3D UpsampleLinear1D
        UpsampleBilinear2D UpsampleBicubic2D UpsampleTrilinear3D ReflectionPad1D ReflectionPad2D
        ReflectionPad3D ReplicationPad1D ReplicationPad2D ReplicationPad3D NllLoss Mv""",
        lambda at: 0 if at.axis == at.position == 0 else None,
    ),
    (
        "NativeLayerNorm FusedRmsNorm",
        lambda at: _but_the_last(at, len(nodes.kept(at.node, "normalized_shape"))),
    ),
    (
        "NativeBatchNorm CudnnBatchNorm MiopenBatchNorm",
        lambda at: at.axis if at.position == 0 and not nodes.normalises_over_batch(at.node) else None,
    ),
    (  # these compute every head of every sample by itself
        """ScaledDotProductFlashAttentionForCpu ScaledDotProductFlashAttention
        ScaledDotProductEfficientAttention ScaledDotProductCudnnAttention""",
        lambda at: _but_the_last(at, 2) if at.position < 3 else None,
    ),
)
_RULES = {kind: rule for names, rule in _BY_RULE for kind in _kinds(names)}
