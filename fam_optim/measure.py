"""Measures of relative flatness: each is a factor F of the weights, ``<F F^T, T>``, T[s,u] = Tr(H_{s,u}).

    neuronwise (kappa, paper section 1):        F = W              sum_{s,u} <w_s, w_u> Tr(H_{s,u})
    layerwise (kappa_hat, paper section 3.2):   F = ||W||_F I_d    ||W||_F^2 Tr(H)

An estimator asks its factor for whichever form of it suits: the Gram matrix, directions in output
space, a random probe, or the covariance under a softmax. All of them carry gradients to W.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch.autograd.function import once_differentiable

if TYPE_CHECKING:
    from torch import Tensor


class Factor(Protocol):
    """F, ``(d, k)``.

    Attributes:
        columns: k, its number of columns.
        directions: how many pairs `direction` has.
    """

    columns: int
    directions: int

    def gram(self) -> Tensor:
        """``F F^T``, ``(d, d)``."""

    def direction(self, k: int) -> tuple[Tensor, Tensor]:
        """The k-th pair ``u, v`` ``(d,)`` of ``sum_k u_k v_k^T = F F^T``.

        v is constant: u carries the gradient, so that ``sum_k <u_k, T v_k>`` is differentiated right
        while T is applied to constants only.
        """

    def probe(self, signs: Tensor) -> tuple[Tensor | float, Tensor]:
        """``c, v`` with ``c v v^T = F s s^T F^T`` for each s in `signs` ``(..., k)``; v is ``(..., d)``."""

    def variance(self, log_p: Tensor) -> Tensor:
        """``<F F^T, diag p - p p^T>`` for every row of log p: ``(n, d)`` to ``(n,)``.

        For F = W the trace of the covariance of the class vectors w_k under p. Nothing cancels where
        the largest probability rounds to one: all terms are of the order of what is left beside it.
        """


class Neuronwise:
    """F = W ``(d, m)``."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix
        d, self.columns = matrix.shape
        self.by_unit = d <= self.columns
        self.directions = min(d, self.columns)

    def gram(self) -> Tensor:
        return self.matrix @ self.matrix.T

    def direction(self, k: int) -> tuple[Tensor, Tensor]:
        if self.by_unit:
            return self.matrix @ self.matrix[k], _unit(k, self.matrix)
        column = self.matrix[:, k]
        constant = column.detach()
        return 2 * column - constant, constant  # has the value of column, twice its gradient

    def probe(self, signs: Tensor) -> tuple[Tensor | float, Tensor]:
        return 1.0, signs @ self.matrix.T

    def variance(self, log_p: Tensor) -> Tensor:
        # Logits may have been cast, down too: transformers computes losses in float32 whatever the model.
        dtype = torch.promote_types(log_p.dtype, self.matrix.dtype)
        variance: Tensor = _ClassVariance.apply(log_p.to(dtype), self.matrix.to(dtype))
        return variance


class Layerwise:
    """F = ||W||_F I ``(d, d)``."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix
        self.columns = self.directions = matrix.shape[0]
        self.square = matrix.square().sum()

    def gram(self) -> Tensor:
        eye = torch.eye(self.columns, dtype=self.square.dtype, device=self.square.device)
        return self.square * eye

    def direction(self, k: int) -> tuple[Tensor, Tensor]:
        unit = _unit(k, self.matrix)
        return self.square * unit, unit

    def probe(self, signs: Tensor) -> tuple[Tensor | float, Tensor]:
        return self.square, signs  # not ||W|| in v: the norm has no derivative at W = 0

    def variance(self, log_p: Tensor) -> Tensor:
        p, _ = _without_top(log_p)
        rest = p.sum(1)
        return self.square * (2 * rest - rest.square() - p.square().sum(1))


class _ClassVariance(torch.autograd.Function):
    """``c_i = sum_k p_ik ||w_k - mu_i||^2`` with ``mu_i = sum_k p_ik w_k``.

    With t the most probable class, q the probabilities of the others and ``delta = mu - w_t``,

        c          = sum_k q_k ||w_k - w_t||^2 - ||delta||^2
        dc/dlog p_k = q_k (||w_k - mu||^2 - ||delta||^2)          (p_t is 1 - sum q)
        dc/dw_k    = 2 p_k (w_k - mu)

    Written out, since it takes three products ``(n, d) x (d, m)``, as many as the head itself, and the
    gradient in log p joins the loss's own before the products that follow.
    """

    @staticmethod
    def forward(ctx: Any, log_p: Tensor, w: Tensor) -> Tensor:
        q, top = _without_top(log_p)
        rest = q.sum(1, keepdim=True)
        w_top, squares = w[top], w.square().sum(1)
        weighted = q @ w
        delta = weighted - rest * w_top
        ctx.save_for_backward(q, rest, top, w, delta, squares)
        around_top = q @ squares + rest[:, 0] * squares[top] - 2 * (w_top * weighted).sum(1)
        return around_top - delta.square().sum(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_row: Tensor) -> tuple[Tensor | None, Tensor | None]:
        q, rest, top, w, delta, squares = ctx.saved_tensors
        weight = by_row[:, None]
        w_top = w[top]
        mean = w_top + delta
        by_log_p = by_w = None
        if ctx.needs_input_grad[0]:
            by_log_p = torch.addmm(squares, mean, w.T, alpha=-2)
            by_log_p += (w_top * (mean + delta)).sum(1, keepdim=True)  # ||mean||^2 - ||delta||^2
            by_log_p *= q
            by_log_p *= weight
        if ctx.needs_input_grad[1]:
            by_w = (by_row @ q)[:, None] * w
            by_w.addmm_(q.T, weight * mean, alpha=-1)
            by_w.index_add_(0, top, (rest - 1) * weight * delta)
            by_w *= 2
        return by_log_p, by_w


def _without_top(log_p: Tensor) -> tuple[Tensor, Tensor]:
    """p with its largest entry set to zero, and where that was ``(n,)``."""
    top = log_p.argmax(1)
    return log_p.exp().scatter(1, top[:, None], 0.0), top


def _unit(k: int, like: Tensor) -> Tensor:
    unit = like.new_zeros(like.shape[0])
    unit[k] = 1
    return unit


MEASURES: dict[str, type[Neuronwise] | type[Layerwise]] = {
    "neuronwise": Neuronwise,
    "layerwise": Layerwise,
}
