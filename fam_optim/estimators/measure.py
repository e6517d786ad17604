"""A measure of relative flatness is ``c <F F^T, T>``, T[s,u] = Tr(H_{s,u}), with c and F made of the weights.

    neuronwise (kappa, paper section 1):        c = 1           F = W     sum_{s,u} <w_s, w_u> Tr(H_{s,u})
    layerwise (kappa_hat, paper section 3.2):   c = ||W||_F^2   F = I_d   ||W||_F^2 Tr(H)

An estimator returns ``<F F^T, T>``. It asks the factor for the form of F that it needs: the Gram matrix,
directions in output space, a random probe, or the covariance under a softmax. All forms carry gradients to W.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

SMALL = 1 << 16  # if all pairs of class vectors have no more numbers, it is fastest to form differences

# With so few multiplications ``W^T g`` is formed, though Gram matrices may take fewer: in float32 these have
# no digits left where class vectors differ little beside what they have in common.
CHEAP = 1 << 18


def doubled(t: Tensor) -> Tensor:
    """Returns `t` with twice its gradient, for a symmetric form whose other, equal factor is a constant."""
    return 2 * t - t.detach()


class Factor:
    """The factor F of a measure: W ``(d, m)``, or I ``(d, d)``, which is never formed where W is not."""

    def __init__(self, matrix: Tensor, measure: str, normalize: bool) -> None:
        self.matrix = matrix  # W
        self.is_identity = measure == "layerwise"
        d, m = matrix.shape
        self.c = (matrix.square().sum() if self.is_identity else 1.0) / (m if normalize else 1)
        self.columns = d if self.is_identity else m
        self.directions = min(d, self.columns)  # the number of rows of each matrix that `pairs` returns
        self.by_unit = d <= m and not self.is_identity  # whether W W^T is smaller than W

    def gram(self) -> Tensor:
        """Returns ``F F^T``, ``(d, d)``."""
        return self.matrix.new_ones(self.columns).diag() if self.is_identity else self.matrix @ self.matrix.T

    def pairs(self) -> tuple[Tensor, Tensor]:
        """Returns ``U, V`` ``(directions, d)`` with ``U^T V = F F^T``. V is constant and U carries the
        gradient, so that of ``sum_k <u_k, T v_k>`` is right, although T is applied to constants only. (With
        ``u_k = v_k`` T cancels what the rows of W have in common; W W^T has few digits of anything else.)"""
        if self.is_identity:
            return self.gram(), self.gram()
        columns = self.matrix
        if self.by_unit:  # in a basis of its rows W has no more columns than rows
            columns = columns @ torch.linalg.qr(columns.detach().mT).Q
        return doubled(columns).T, columns.detach().T

    def probe(self, signs: Tensor) -> Tensor:
        """Returns ``F s`` for each s in `signs` ``(..., columns)``."""
        return signs if self.is_identity else signs @ self.matrix.T

    def pulled(self, rows: Tensor) -> Tensor:
        """Returns ``F^T x`` for each x in `rows` ``(..., d)``."""
        return rows if self.is_identity else rows @ self.matrix

    def weighted_squares(self, rows: Tensor, by_row: Tensor, product: Tensor | None) -> Tensor:
        """Returns ``sum_i b_i ||F^T x_i||^2`` ``()`` for x ``(n, d)`` and b ``(n,)``; it is never negative.
        `product` is ``x W``, if the caller has it. If it is a constant, so are x and b."""
        if product is None or self.is_identity:
            product = self.pulled(rows)
        elif not product.requires_grad:  # <W, sum_i b_i x_i (x_i W)^T>
            derivative = rows.mT @ (by_row[:, None] * product)
            return doubled((self.matrix * derivative).sum()).clamp_min(0)
        return (by_row * product.square().sum(1)).sum()

    def inner(self, rows: Tensor) -> Tensor:
        """Returns ``<F^T x_a, F^T x_b>`` ``(..., n, n)`` for the rows x of each group ``(..., n, d)``."""
        if self.by_unit and rows.numel() * self.columns > CHEAP:
            return (rows @ self.gram()) @ rows.mT
        pulled = self.pulled(rows)
        return pulled @ pulled.mT

    def square(self, g: Tensor) -> Tensor:
        """Returns ``||F^T g||_F^2``, ``()``, of one g ``(d, m)`` or several side by side; never negative. For
        F = W it takes the Gram matrices of W and g where d <= m, else ``W^T g``; as much in the backward."""
        if self.by_unit and g.numel() * self.columns > CHEAP:
            of_w, of_g = (doubled(t) @ t.detach().T for t in (self.matrix, g))
            return (of_w * of_g).sum().clamp_min(0)
        return self.pulled(g.mT).square().sum()

    def weight_probe(self, draw: Callable[[tuple[int, ...]], Tensor]) -> Tensor:
        """Returns a random V ``(d, m)`` with ``E[V_si V_uj] = (F F^T)_su 1[i = j]``, and so
        ``E <V, H V> = <F F^T, T>``. `draw` returns independent signs of a shape."""
        if self.is_identity:
            return draw(tuple(self.matrix.shape))
        # V = W Z with uncorrelated entries Z[k,t] = s_k r_{t-k}, computed as a circular convolution.
        signs, ring = draw((self.columns,)), draw((self.columns,))
        spectrum = torch.fft.rfft(self.matrix * signs) * torch.fft.rfft(ring)
        v: Tensor = torch.fft.irfft(spectrum, n=self.columns)
        return v

    def variance(self, log_p: Tensor, by_row: Tensor) -> Tensor:
        """Returns ``sum_i b_i <F F^T, diag p_i - p_i p_i^T>``, ``()``, of log p ``(n, d)`` and b ``(n,)``.
        Cost for F = W: at most one product ``(n, d) x (d, m)``, and two in the backward."""
        if self.is_identity:  # 1 - ||p||^2, without subtracting numbers near 1
            q, _ = _without_top(log_p)
            rest = q.sum(1)
            return (by_row * (2 * rest - rest.square() - q.square().sum(1))).sum()
        # Logits may have been cast, also down: transformers computes losses in float32 for every model.
        dtype = torch.promote_types(log_p.dtype, self.matrix.dtype)
        log_p, w, by_row = (t.to(dtype) for t in (log_p, self.matrix, by_row))
        if len(w) * w.numel() <= SMALL:  # 1/2 sum_kl p_k p_l ||w_k - w_l||^2
            p, distances = log_p.exp(), (w[:, None] - w).square().sum(2)
            return ((p @ distances) * p).sum(1).dot(by_row) / 2
        traces: Tensor = _Trace.apply(log_p, w)
        return traces.dot(by_row)


class _Trace(torch.autograd.Function):
    """The traces c ``(n,)`` of the class vectors' covariances under the rows of p, with a gradient written by
    hand, which keeps no other tensor of log p's size:

    dc/dlog p_k = q_k (||w_k - mu||^2 - ||delta||^2)          (p_t is 1 - sum q)
    dc/dw_k     = 2 p_k (w_k - mu)
    """

    @staticmethod
    def forward(ctx: Any, log_p: Tensor, weight: Tensor) -> Any:
        *parts, c = _parts_of_trace(log_p, weight)
        ctx.save_for_backward(log_p, weight, *parts)
        return c

    @staticmethod
    def backward(ctx: Any, by_row: Tensor) -> Any:
        log_p, weight, w, squares, top, rest, delta = ctx.saved_tensors
        if torch.is_grad_enabled():  # by operations that can be differentiated again
            # log p is computed from W; views keep the derivative in W apart from the one through log p.
            views = [t.view_as(t).requires_grad_() for t in (log_p, weight)]
            return torch.autograd.grad(_parts_of_trace(*views)[-1], views, by_row, create_graph=True)
        in_log_p, in_w = ctx.needs_input_grad
        mean, b = w[top] + delta, by_row[:, None]
        weighted = log_p.exp().scatter_(1, top[:, None], 0.0).mul_(b)
        by_log_p = by_w = None
        if in_w:
            by_w = (2 * weighted.sum(0)[:, None] * w).addmm_(weighted.T, mean, alpha=-2)
            by_w.index_add_(0, top, (rest - 1)[:, None] * b * delta, alpha=2)
        if in_log_p:
            # ||w_k - mu||^2 - ||delta||^2; its part ||w_t||^2 + 2 <w_t, delta> does not depend on k
            beside = squares[top] + 2 * (w[top] * delta).sum(1)
            by_log_p = torch.addmm(squares, mean, w.T, alpha=-2).add_(beside[:, None]).mul_(weighted)
        return by_log_p, by_w


def _parts_of_trace(log_p: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    """Returns the class vectors and their squares, t, the sum of q, delta and c ``(n,)``. Here t is the most
    probable class, q the probabilities of the others, mu the mean, delta = mu - w_t, and

        c = sum_k q_k (||w_k||^2 - ||w_t||^2) - <delta, w_t + mu>

    This form loses no digits where the largest probability rounds to one. Shifting all class vectors does not
    change c, so their mean, which may be large beside their differences, is subtracted first.
    """
    q, top = _without_top(log_p)
    rest, w = q.sum(1), w - w.detach().mean(0)
    squares, w_top = w.square().sum(1), w[top]
    delta = q @ w - rest[:, None] * w_top
    c = q @ squares - rest * squares[top] - (delta * (2 * w_top + delta)).sum(1)
    return w, squares, top, rest, delta, c


def _without_top(log_p: Tensor) -> tuple[Tensor, Tensor]:
    """Returns p with each row's largest entry set to zero, and the position of that entry ``(n,)``."""
    top = log_p.argmax(1)
    return log_p.exp().scatter(1, top[:, None], 0.0), top
