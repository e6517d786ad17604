"""The trace of the covariance of class vectors under softmax probabilities: the closed form's arithmetic.

    sum_i b_i c_i,    c_i = sum_k p_ik ||w_k - mu_i||^2,    mu_i = sum_k p_ik w_k

for log p ``(n, d)``, class vectors W ``(d, m)`` and a weight b_i per row. With t the most probable class, q
the probabilities of the others, and delta = mu - w_t,

    c = sum_k q_k (||w_k||^2 - ||w_t||^2) - <delta, w_t + mu>

in which nothing cancels where the largest probability rounds to one. Moving all class vectors alike changes
nothing, so what they have in common is taken away first: it may be large beside their differences.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

SMALL = 1 << 16
"""Up to so many numbers in the differences of all pairs of class vectors, these are what takes least time."""


def trace_of_covariance(log_p: Tensor, w: Tensor, by_row: Tensor) -> Tensor:
    """``sum_i b_i c_i``, ``()``, of log p ``(n, d)``, W ``(d, m)`` and b ``(n,)``; twice differentiable.

    Cost: one product ``(n, d) x (d, m)`` and two in the backward, or less.
    """
    if len(w) * w.numel() <= SMALL:  # 1/2 sum_kl p_k p_l ||w_k - w_l||^2
        p, distances = log_p.exp(), (w[:, None] - w).square().sum(2)
        return ((p @ distances) * p).sum(1).dot(by_row) / 2
    trace: Tensor = _Trace.apply(log_p, w, by_row)
    return trace


def variance_of_indicator(log_p: Tensor, by_row: Tensor) -> Tensor:
    """``sum_i b_i (1 - ||p_i||^2)``, ``()``: the same for orthonormal class vectors."""
    q, _ = _without_top(log_p)
    rest = q.sum(1)
    return (by_row * (2 * rest - rest.square() - q.square().sum(1))).sum()


class _Trace(torch.autograd.Function):
    """The trace with its gradient written out, which keeps nothing of the size of log p but log p:

    dc/dlog p_k = q_k (||w_k - mu||^2 - ||delta||^2)          (p_t is 1 - sum q)
    dc/dw_k     = 2 p_k (w_k - mu)
    """

    @staticmethod
    def forward(ctx: Any, log_p: Tensor, weight: Tensor, by_row: Tensor) -> Any:
        w = weight - weight.mean(0)
        squares = torch.linalg.vector_norm(w, dim=1).square_()  # without a copy of w
        top = log_p.max(1).indices  # half the time of argmax on the CPU
        q = log_p.exp().scatter_(1, top[:, None], 0.0)
        rest, w_top = q.sum(1), w[top]
        delta = (q @ w).addcmul_(rest[:, None], w_top, value=-1)
        shift = 2 * (w_top * delta).sum(1)
        c = q @ squares - rest * squares[top] - shift - delta.square().sum(1)
        ctx.save_for_backward(log_p, weight, by_row, w, squares, top, rest, delta, squares[top] + shift, c)
        return c.dot(by_row)

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> Any:
        *inputs, w, squares, top, rest, delta, beside, c = ctx.saved_tensors
        if torch.is_grad_enabled():
            return _differentiable_backward(ctx, scale, *inputs)
        log_p, _, by_row = inputs
        in_log_p, in_w, in_by_row = ctx.needs_input_grad
        mean, b = w[top] + delta, (scale * by_row)[:, None]
        weighted = log_p.exp().scatter_(1, top[:, None], 0.0).mul_(b)
        by_log_p = by_w = None
        if in_w:
            by_w = (2 * weighted.sum(0)[:, None] * w).addmm_(weighted.T, mean, alpha=-2)
            by_w.index_add_(0, top, (rest - 1)[:, None] * b * delta, alpha=2)
        if in_log_p:
            # ||w_k - mu||^2 - ||delta||^2, of which ||w_t||^2 + 2 <w_t, delta> does not depend on k
            by_log_p = torch.addmm(squares, mean, w.T, alpha=-2).add_(beside[:, None]).mul_(weighted)
        return by_log_p, by_w, scale * c if in_by_row else None


def _differentiable_backward(ctx: Any, scale: Tensor, *inputs: Tensor) -> tuple[Tensor | None, ...]:
    """The same gradient, in operations that can be differentiated again."""
    # Views, so that the derivative in W is not also the one through log p, which is computed from W.
    views = [t.view_as(t) for t in inputs]
    needed = [t for t, asked in zip(views, ctx.needs_input_grad, strict=True) if asked]
    found = iter(torch.autograd.grad(_by_autograd(*views), needed, scale, create_graph=True))
    return tuple(next(found) if asked else None for asked in ctx.needs_input_grad)


def _by_autograd(log_p: Tensor, w: Tensor, by_row: Tensor) -> Tensor:
    """The trace, in operations that autograd knows."""
    q, top = _without_top(log_p)
    rest, centred = q.sum(1), w - w.detach().mean(0)
    squares, w_top = centred.square().sum(1), centred[top]
    delta = q @ centred - rest[:, None] * w_top
    c = q @ squares - rest * squares[top] - (delta * (2 * w_top + delta)).sum(1)
    trace: Tensor = c.dot(by_row)
    return trace


def _without_top(log_p: Tensor) -> tuple[Tensor, Tensor]:
    """p with its largest entry set to zero, and where that was ``(n,)``."""
    top = log_p.argmax(1)
    return log_p.exp().scatter(1, top[:, None], 0.0), top
