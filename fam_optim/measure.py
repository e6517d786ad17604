"""Measures of relative flatness: each is a factor F of the weights, ``<F F^T, T>``, T[s,u] = Tr(H_{s,u}).

    neuronwise (kappa, paper section 1):        F = W              sum_{s,u} <w_s, w_u> Tr(H_{s,u})
    layerwise (kappa_hat, paper section 3.2):   F = ||W||_F I_d    ||W||_F^2 Tr(H)

An estimator asks its factor for whichever form of it suits: the Gram matrix, directions in output
space, a random probe, or the covariance under a softmax. All of them carry gradients to W.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch

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

    def covariance(self, p: Tensor, top: Tensor) -> Tensor:
        """``<F F^T, diag p - p p^T>`` for every row of p: ``(n, d)`` to ``(n,)``.

        `p` are probabilities with the entry of the class `top` ``(n,)`` set to zero: what is left,
        ``q = sum p``, is accurate also where the top probability rounds to one, and all terms are of
        the order of q, so that nothing cancels.
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

    def covariance(self, p: Tensor, top: Tensor) -> Tensor:
        # With delta = sum_k p_k (w_k - w_top) the mean is w_top + delta, and the variance around it
        # sum_k p_k ||w_k - w_top||^2 - ||delta||^2; the squares are expanded so that one product with W does.
        q = p.sum(1)
        w_top = self.matrix[top]
        mean = p @ self.matrix
        delta = mean - q[:, None] * w_top
        squares = self.matrix.square().sum(1)
        around_top = p @ squares + q * squares[top] - 2 * (w_top * mean).sum(1)
        return around_top - delta.square().sum(1)


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

    def covariance(self, p: Tensor, top: Tensor) -> Tensor:
        q = p.sum(1)
        return self.square * (2 * q - q.square() - p.square().sum(1))


def _unit(k: int, like: Tensor) -> Tensor:
    unit = like.new_zeros(like.shape[0])
    unit[k] = 1
    return unit


MEASURES: dict[str, type[Neuronwise] | type[Layerwise]] = {
    "neuronwise": Neuronwise,
    "layerwise": Layerwise,
}
