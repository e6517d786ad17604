"""The closed form where the layer feeds a softmax cross-entropy.

If L is linear in the log-probabilities of the layer's rows, ``L = sum_i sum_k c_ik log p_ik``, then with
``a_i = -sum_k c_ik`` (1/N, a class weight, 0 where a target is ignored; smoothing changes nothing)

    Hess_{z_i}(L) = a_i (diag p_i - p_i p_i^T)
    <F F^T, T>    = sum_i a_i ||phi_i||^2 <F F^T, diag p_i - p_i p_i^T>               (DESIGN, 3)

the squared feature norm times the variance of the class vectors under p. If the softmax is taken of
``y_j = c_j z_i(j) + const`` (shifted tokens, a temperature, a prior on the classes), row j counts with
``c_j^2 ||phi_i(j)||^2``.

That L is of this form is read off the graph, see `softmax_heads`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from fam_optim.graph import nodes
from fam_optim.graph.softmax_heads import SoftmaxHead, keeps_order, ones, scales, to_softmaxes
from fam_optim.layer.use import at_least_float32

if TYPE_CHECKING:
    from torch import Tensor

    from fam_optim.estimators.measure import Factor
    from fam_optim.graph.trace import Tail


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
        dim = nodes.softmax_axis(head.node)
        norms = (head.use if differentiable else head.use.detached()).squared_norms()
        if not keeps_order(head):
            norms = to_softmaxes(head, norms).select(dim, 0)
            if scales(head):
                norms = norms * to_softmaxes(head, ones(head)).select(dim, 0)
            if not differentiable:
                norms = norms.detach()
        a = at_least_float32(descent).sum(dim)
        rows = _as_rows(log_p if differentiable else log_p.detach(), dim)
        values.append(factor.variance(at_least_float32(rows), a.flatten() * norms.flatten()))
    return values[0] if len(values) == 1 else torch.stack(values).sum()


def _descent(loss: Tensor, head: SoftmaxHead, log_p: Tensor, *, differentiable: bool) -> Tensor:
    """-dL/dlog p."""
    node: Any = loss.grad_fn
    minus = torch.full_like(loss, -1)
    direct = nodes.kind(node).startswith("NllLoss") and node.next_functions[0][0] is head.node
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
