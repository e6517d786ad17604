"""The closed form where the layer feeds a softmax cross-entropy.

If L is linear in the log-probabilities of the layer's rows, ``L = sum_i sum_k c_ik log p_ik``, then with
``a_i = -sum_k c_ik`` (1/N, a class weight, 0 where a target is ignored; smoothing changes nothing)

    Hess_{z_i}(L) = a_i (diag p_i - p_i p_i^T)
    <F F^T, T>    = sum_i a_i ||phi_i||^2 <F F^T, diag p_i - p_i p_i^T>

the squared feature norm times the variance of the class vectors under p. If the softmax is taken of
``y_j = c_j z_i(j) + const`` (shifted tokens, a temperature, a prior on the classes), row j counts with
``c_j^2 ||phi_i(j)||^2``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from fam_optim.graph.heads import find_heads, to_softmax

if TYPE_CHECKING:
    from torch import Tensor

    from fam_optim.estimators.measure import Factor
    from fam_optim.graph.heads import Head
    from fam_optim.graph.trace import Tail


def closed_form(tail: Tail, factor: Factor, *, differentiable: bool) -> Tensor | None:
    """``<F F^T, T>``, twice differentiable; None if the layer does not feed a softmax cross-entropy.

    Cost: for the neuronwise measure one product ``(rows, d) x (d, m)``, and two in the backward; the
    largest tensors have the size of the logits. No (rows, d, d) and no (d, d) tensor.
    """
    heads = find_heads(tail, differentiable=differentiable)
    if heads is None:
        return None
    values = [_of_head(head, factor, differentiable) for head in heads]
    return values[0] if len(values) == 1 else torch.stack(values).sum()


def _of_head(head: Head, factor: Factor, differentiable: bool) -> Tensor:
    norms = (head.use if differentiable else head.use.detached()).squared_norms()
    if not head.in_order:
        norms = to_softmax(head, norms)
    a = head.softmax.a.flatten() * (norms if differentiable else norms.detach()).flatten()
    log_p, dim = head.softmax.log_p, head.softmax.dim
    # The tensor itself where it is a matrix already, since a view is a node of the graph.
    rows = log_p if dim == log_p.dim() - 1 else log_p.movedim(dim, -1)
    return factor.variance(rows if rows.dim() == 2 else rows.reshape(-1, rows.shape[-1]), a)
