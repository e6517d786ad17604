"""The closed form where the layer feeds a softmax cross-entropy.

If L is linear in the log-probabilities of the layer's rows, ``L = sum_i sum_k c_ik log p_ik``, then with
``a_i = -sum_k c_ik`` (1/N, a class weight, 0 where a target is ignored; smoothing changes nothing)

    Hess_{z_i}(L) = a_i (diag p_i - p_i p_i^T)
    <F F^T, T>    = sum_i a_i ||phi_i||^2 <F F^T, diag p_i - p_i p_i^T>               (DESIGN, 3)

the squared feature norm times the variance of the class vectors under p. That L is of this form is read
off the graph: between the loss and log_softmax there are only operations linear in the latter, and
between log_softmax and the layer's output only ones that move entries. Whatever is not recognised
goes the general way.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.autograd.graph import GradientEdge

from fam_optim.curvature import saved_dim
from fam_optim.layer import LayerUse, at_least_float32
from fam_optim.parallel import DDP_SINK, inputs_of
from fam_optim.verdicts import holds, signature

if TYPE_CHECKING:
    from torch import Tensor
    from torch.autograd.graph import Node

    from fam_optim.measure import Factor
    from fam_optim.tail import Tail

# Names of autograd nodes, without "Backward" and the number.
_ORDER_KEEPING = {
    *("View", "UnsafeView", "ReshapeAlias", "Squeeze", "Unsqueeze", "Clone", "ToCopy", "Alias", DDP_SINK)
}
_MOVING = _ORDER_KEEPING | {"Transpose", "Permute", "T", "Slice", "Select", "Index", "IndexSelect", "Narrow"}
_LINEAR = _MOVING | {
    *("Add", "Sub", "Neg", "Sum", "Mean", "Expand", "Gather", "MaskedFill", "MaskedSelect", "Where"),
    *("Cat", "Stack", "Split", "SplitWithSizes", "Unbind", "NllLoss", "NllLoss2D"),
}
_LINEAR_IN_FIRST = {"Div", "KlDiv"}
_LINEAR_IN_EITHER = {"Mul", "Dot", "Mv", "Mm", "Bmm"}


class SoftmaxHead(NamedTuple):
    """One log_softmax of one use's output.

    Attributes:
        node: the log_softmax.
        use, edge: the layer's use that it belongs to.
        moves: the operations between the two.
        constant: whether the weights a do not depend on anything that is differentiated.
    """

    node: Node
    use: LayerUse
    edge: GradientEdge
    moves: tuple[str, ...]
    constant: bool


def find_softmax_heads(tail: Tail) -> list[SoftmaxHead] | None:
    """The tail as softmax heads, or None if it is anything else."""
    if tail.nested or not all(isinstance(use, LayerUse) and use.has_rows for use in tail.uses):
        return None
    ends = {edge.node: (use, edge) for use, edge in zip(tail.uses, tail.edges, strict=True)}
    descended = _descend_linear(tail, set(tail.path) | set(ends), set(ends))
    if descended is None:
        return None
    nodes, constant = descended
    heads = []
    for node in nodes:
        moves = []
        below, output = node.next_functions[0]
        while below is not None and below not in ends and _kind(below) in _MOVING:
            moves.append(_kind(below))
            below, output = inputs_of(below, output)[0]
        if below not in ends:
            return None
        use, edge = ends[below]
        head = SoftmaxHead(node, use, edge, tuple(moves), constant)  # type: ignore[arg-type]
        if not _over_the_outputs(head, tail):
            return None
        heads.append(head)
    return heads or None


def softmax_curvature(
    tail: Tail, heads: list[SoftmaxHead], factor: Factor, *, differentiable: bool
) -> Tensor:
    """``<F F^T, T>`` in closed form.

    Cost: for the neuronwise measure one product ``(rows, d) x (d, m)``, and two in the backward; the
    largest tensors have the size of the logits. No (rows, d, d) and no (d, d) tensor.
    """
    values = []
    for head in heads:
        # log p as the graph keeps it, attached: the penalty's gradient joins the loss's at this node.
        log_p = head.node._saved_result  # type: ignore[attr-defined]
        trained = differentiable and not head.constant
        descent = _descent(tail.loss, head, log_p, differentiable=trained)
        dim = saved_dim(head.node)
        norms = (head.use if differentiable else head.use.detached()).squared_norms()
        if not _keeps_order(head):
            norms = _to_softmaxes(head, norms, log_p, dim)
        a = at_least_float32(descent).sum(dim)
        rows = _as_rows(log_p if differentiable else log_p.detach(), dim)
        values.append(factor.variance(at_least_float32(rows), a.flatten() * norms.flatten()))
    return values[0] if len(values) == 1 else torch.stack(values).sum()


def _descent(loss: Tensor, head: SoftmaxHead, log_p: Tensor, *, differentiable: bool) -> Tensor:
    """-dL/dlog p."""
    node: Any = loss.grad_fn
    minus = torch.full_like(loss, -1)
    direct = _kind(node).startswith("NllLoss") and node.next_functions[0][0] is head.node
    if direct and not differentiable and not loss._backward_hooks:
        # The plain cross-entropy, most losses: its node gives the derivative as it does to the engine, whose
        # start takes as long as a dozen operations on a small head.
        with torch.no_grad():
            descent: Tensor = node(minus)
        return descent
    (descent,) = torch.autograd.grad(loss, log_p, minus, create_graph=differentiable, retain_graph=True)
    return descent


def _as_rows(log_p: Tensor, dim: int) -> Tensor:
    """log p ``(n, d)``; the tensor itself where it is that already, since a view is a node of the graph."""
    rows = log_p if dim == log_p.dim() - 1 else log_p.movedim(dim, -1)
    return rows if rows.dim() == 2 else rows.reshape(-1, rows.shape[-1])


def _descend_linear(tail: Tail, path: set[Node], ends: set[Node]) -> tuple[list[Node], bool] | None:
    """The log_softmax nodes that the loss is linear in, and whether its coefficients are constants."""
    heads, constant = [], True
    root = tail.loss.grad_fn
    assert root is not None
    stack = [(root, tail.loss.output_nr)]
    seen = set(stack)
    while stack:
        node, output = stack.pop()
        kind = _kind(node)
        if kind == "LogSoftmax":
            heads.append(node)
            continue
        if node in ends:  # linear in z itself: no curvature
            continue
        inputs = inputs_of(node, output)
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
    return heads, constant


def _over_the_outputs(head: SoftmaxHead, tail: Tail) -> bool:
    """Whether the softmax is taken over exactly the d outputs of each of the layer's rows."""
    log_p: Tensor = head.node._saved_result  # type: ignore[attr-defined]
    dim = saved_dim(head.node)
    if log_p.shape[dim] != head.use.d:
        return False
    if _keeps_order(head):
        return dim == (head.use.channel % log_p.dim() if not head.moves else log_p.dim() - 1)
    # Label the classes and carry the labels back to z: there each output must find its own.
    shape = [1] * log_p.dim()
    shape[dim] = -1
    labels = torch.arange(head.use.d, dtype=log_p.dtype, device=log_p.device)
    ones = torch.ones_like(log_p)
    carried = _carry_back(head, labels.reshape(shape) * ones).movedim(head.use.channel, -1)
    counts = _carry_back(head, ones).movedim(head.use.channel, -1)
    key = (signature(tail), "softmax over the outputs", log_p.shape, head.use.shape, dim)
    return holds(key, (carried == labels * counts).all() & (counts == counts[..., :1]).all())


def _keeps_order(head: SoftmaxHead) -> bool:
    """Whether log p has the entries of z in the order of z."""
    if not head.moves:
        return True
    last = head.use.channel % len(head.use.shape) == len(head.use.shape) - 1
    return last and set(head.moves) <= _ORDER_KEEPING


def _to_softmaxes(head: SoftmaxHead, by_row: Tensor, log_p: Tensor, dim: int) -> Tensor:
    """One number per row of z to one per softmax: the transpose of carrying back."""
    zeros = torch.zeros_like(log_p, requires_grad=True)
    spread = by_row.unsqueeze(head.use.channel).expand(head.use.shape)
    (moved,) = torch.autograd.grad(_carry_back(head, zeros), zeros, spread, create_graph=True)
    return at_least_float32(moved).select(dim, 0)


def _carry_back(head: SoftmaxHead, t: Tensor) -> Tensor:
    """`t`, laid out as the log_softmax, to the layout of z, through the operations that move entries."""
    below, output = head.node.next_functions[0]
    assert below is not None
    (moved,) = torch.autograd.grad(
        GradientEdge(below, output), head.edge, t, create_graph=True, retain_graph=True
    )
    return at_least_float32(moved).reshape(head.use.shape)


def _kind(node: Node) -> str:
    return node.name().rstrip("0123456789").removesuffix("Backward")
