"""The trace of the covariance of class vectors under softmax probabilities: the closed form's arithmetic.

    sum_i b_i c_i,    c_i = sum_k p_ik ||w_k||^2 - ||sum_k p_ik w_k||^2

for log p ``(n, d)``, class vectors W ``(d, m)`` and a weight b_i per row, in two ways: by pairs of classes
where they are few, around the most probable where they are many. In neither do terms cancel where the largest
probability rounds to one. Moving all class vectors alike changes nothing, so what they have in common is
taken away first: it may be large beside their differences.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


def trace_of_covariance(log_p: Tensor, w: Tensor, by_row: Tensor) -> Tensor:
    """``sum_i b_i c_i``, ``()``, of log p ``(n, d)``, W ``(d, m)`` and b ``(n,)``; twice differentiable.

    Cost: one product ``(n, d) x (d, m)`` and two in the backward, or less.
    """
    n, d = log_p.shape
    function = _ByPairs if few_classes(n, d, w.shape[1]) else _ByMean
    trace: Tensor = function.apply(log_p, w, by_row)
    return trace


def variance_of_indicator(log_p: Tensor, by_row: Tensor) -> Tensor:
    """``sum_i b_i (1 - ||p_i||^2)``, ``()``: the same for orthonormal class vectors."""
    p, _ = _without_top(log_p)
    rest = p.sum(1)
    return (by_row * (2 * rest - rest.square() - p.square().sum(1))).sum()


def few_classes(n: int, d: int, m: int) -> bool:
    """Whether pairs of the d classes take less time than products of the size of the head itself.

    They take ``d d (n + 2 m)`` multiplications against ``3 n d m``, and were as fast with twice as many,
    since they read and write less, and with a few million more, since they are fewer operations.
    """
    return d <= max(n, m) and d * d * (n + 2 * m) < 6 * n * d * m + 8_000_000


class _ByPairs(torch.autograd.Function):
    """For few classes: ``sum_i b_i c_i``, ``c_i = 1/2 sum_kl p_ik p_il D_kl``, ``D_kl = ||w_k - w_l||^2``.

        dc/dlog p_k = p_k sum_l D_kl p_l          (up to what log_softmax's backward takes away)
        dc/dw_k     = 2 p_k sum_l p_l (w_k - w_l)

    Nothing of the size of the layer's inputs ``(n, m)`` is formed: the products are ``(d, m) x (m, d)``,
    ``(n, d) x (d, d)``, and as many in the backward. All terms are positive, so nothing cancels.
    """

    @staticmethod
    def forward(ctx: Any, log_p: Tensor, w: Tensor, by_row: Tensor) -> Tensor:
        p, centred = log_p.exp(), w - w.mean(0)
        squares = centred.square().sum(1)
        distances = (
            torch.addmm(squares, centred, centred.T, alpha=-2).add_(squares[:, None]).fill_diagonal_(0)
        )
        around = p @ distances
        c = (p * around).sum(1) / 2
        ctx.save_for_backward(log_p, w, by_row, p, centred, around, c)
        return c.dot(by_row)

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> Any:
        *inputs, p, w, around, c = ctx.saved_tensors
        if torch.is_grad_enabled():
            return _differentiable_backward(ctx, scale, *inputs)
        by_row = inputs[-1]
        in_log_p, in_w, in_by_row = ctx.needs_input_grad
        weighted = p * (scale * by_row)[:, None]
        by_w = None
        if in_w:
            pairs = (weighted.T @ p).fill_diagonal_(0)  # w_k - w_k contributes nothing
            by_w = torch.addmm(pairs.sum(1, keepdim=True) * w, pairs, w, beta=2, alpha=-2)
        return weighted * around if in_log_p else None, by_w, scale * c if in_by_row else None


class _ByMean(torch.autograd.Function):
    """For many classes: ``sum_i b_i c_i``, ``c_i = sum_k p_ik ||w_k - mu_i||^2``, ``mu_i = sum_k p_ik w_k``.

    With t the most probable class, q the probabilities of the others and ``delta = mu - w_t``,

        c           = sum_k q_k (||w_k||^2 - ||w_t||^2) - <delta, w_t + mu>
        dc/dlog p_k = q_k (||w_k - mu||^2 - ||delta||^2)          (p_t is 1 - sum q)
        dc/dw_k     = 2 p_k (w_k - mu)

    Written out, since it takes three products ``(n, d) x (d, m)``, as many as the head itself, and the
    gradient in log p joins the loss's own before the products that follow. What has the size of log p
    is made anew and in parts, so that the memory beside the head's own is the gradient in log p and W.
    """

    @staticmethod
    def forward(ctx: Any, log_p: Tensor, weight: Tensor, by_row: Tensor) -> Tensor:
        w = weight - weight.mean(0)
        squares = torch.linalg.vector_norm(w, dim=1).square_()  # without a copy of w
        results = []
        for part in _parts(log_p):
            top = log_p[part].max(1).indices  # half the time of argmax on the CPU
            q = log_p[part].exp().scatter_(1, top[:, None], 0.0)
            rest = q.sum(1, keepdim=True)
            w_top = w[top]
            delta = (q @ w).addcmul_(rest, w_top, value=-1)
            around_top = torch.addcmul(q @ squares, rest[:, 0], squares[top], value=-1)
            shift = 2 * w_top.mul_(delta).sum(1)  # 2 <w_t, delta>
            c = around_top - shift - torch.linalg.vector_norm(delta, dim=1).square_()
            results.append((top, rest, delta, squares[top] + shift, c))
        top, rest, delta, beside, c = (_joined(parts) for parts in zip(*results, strict=True))
        ctx.save_for_backward(log_p, weight, by_row, rest, top, w, delta, squares, beside, c)
        return c.dot(by_row)

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> Any:
        *inputs, rest, top, w, delta, squares, beside, c = ctx.saved_tensors
        if torch.is_grad_enabled():
            return _differentiable_backward(ctx, scale, *inputs)
        log_p, _, by_row = inputs
        in_log_p, in_w, in_by_row = ctx.needs_input_grad
        weight = (scale * by_row)[:, None]
        mean = w[top].add_(delta)
        by_log_p = torch.empty_like(log_p) if in_log_p else None
        by_w = torch.empty_like(w) if in_w else None
        by_class = torch.zeros_like(squares)
        for part in _parts(log_p):
            weighted = log_p[part].exp().scatter_(1, top[part, None], 0.0).mul_(weight[part])
            if by_w is not None:
                by_class += weighted.sum(0)
                by_w.addmm_(weighted.T, mean[part], beta=0 if part.start == 0 else 1, alpha=-2)
            if by_log_p is not None:
                inside = torch.addmm(squares, mean[part], w.T, alpha=-2, out=by_log_p[part])
                # ||w_k - mean||^2 - ||delta||^2, of which ||w_t||^2 + 2 <w_t, delta> does not depend on k
                inside += beside[part, None]
                inside *= weighted
        if by_w is not None:
            by_w.addcmul_(by_class[:, None], w, value=2)
            by_w.index_add_(0, top, (rest - 1) * weight * delta, alpha=2)
        return by_log_p, by_w, scale * c if in_by_row else None


def _differentiable_backward(ctx: Any, scale: Tensor, *inputs: Tensor) -> tuple[Tensor | None, ...]:
    """The same gradient, in operations that can be differentiated again."""
    # Views, so that the derivative in W is not also the one through log p, which is computed from W.
    partial = [t.view_as(t) for t in inputs]
    log_p, w, by_row = partial
    q, top = _without_top(log_p)
    rest, centred = q.sum(1), w - w.detach().mean(0)
    squares, w_top = centred.square().sum(1), centred[top]
    delta = q @ centred - rest[:, None] * w_top
    c = q @ squares - rest * squares[top] - (delta * (2 * w_top + delta)).sum(1)
    needed = [t for t, asked in zip(partial, ctx.needs_input_grad, strict=True) if asked]
    found = iter(torch.autograd.grad(c @ by_row, needed, scale, create_graph=True))
    return tuple(next(found) if asked else None for asked in ctx.needs_input_grad)


PART = 1 << 23
"""Numbers of log p that are worked on at a time."""


def _parts(log_p: Tensor) -> list[slice]:
    """The rows in parts of about `PART` numbers."""
    n, d = log_p.shape
    rows = max(1, PART // d)
    return [slice(start, start + rows) for start in range(0, n, rows)]


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def _without_top(log_p: Tensor) -> tuple[Tensor, Tensor]:
    """p with its largest entry set to zero, and where that was ``(n,)``."""
    top = log_p.argmax(1)
    return log_p.exp().scatter(1, top[:, None], 0.0), top
