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

from fam_optim.estimators.variance import trace_of_covariance, variance_of_indicator

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor


class Factor(Protocol):
    """F, ``(d, k)``.

    Attributes:
        columns: k, its number of columns.
        directions: how many columns `pairs` has.
    """

    columns: int
    directions: int

    def gram(self) -> Tensor:
        """``F F^T``, ``(d, d)``."""

    def pairs(self) -> tuple[Tensor, Tensor]:
        """``U, V`` ``(d, directions)`` with ``U V^T = F F^T``.

        V is constant: U carries the gradient, so that ``sum_k <u_k, T v_k>`` is differentiated right
        while T is applied to constants only.
        """

    def probe(self, signs: Tensor) -> tuple[Tensor | float, Tensor]:
        """``c, v`` with ``c v v^T = F s s^T F^T`` for each s in `signs` ``(..., k)``; v is ``(..., d)``."""

    def pulled(self, rows: Tensor, product: Tensor | None = None) -> tuple[Tensor | float, Tensor]:
        """``c, y`` with ``c ||y||^2 = ||F^T x||^2`` for each x in `rows` ``(..., d)``; y is ``(..., k)``.

        `product` is ``x W``, if somebody has formed it.
        """

    def inner(self, rows: Tensor) -> Tensor:
        """``<F^T x_a, F^T x_b>`` of the rows x of each group ``(..., n, d)``: ``(..., n, n)``."""

    def square(self, g: Tensor) -> Tensor:
        """``||F^T g||_F^2``, ``()``, of g ``(d, m)`` or several side by side; never negative.

        Through the smaller Gram matrix.
        """

    def weight_probe(self, draw: Callable[[tuple[int, ...]], Tensor]) -> tuple[Tensor | float, Tensor]:
        """``c, V`` with V ``(d, m)`` random and ``E[c V_si V_uj] = (F F^T)_su 1[i = j]``.

        So ``E[c <V, H V>] = <F F^T, T>``. `draw` makes independent signs of a shape.
        """

    def variance(self, log_p: Tensor, by_row: Tensor) -> Tensor:
        """``sum_i b_i <F F^T, diag p_i - p_i p_i^T>``, ``()``, of log p ``(n, d)`` and b ``(n,)``.

        For F = W the traces of the covariance of the class vectors w_k under p. Nothing cancels where
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

    def pairs(self) -> tuple[Tensor, Tensor]:
        if self.by_unit:
            return self.gram(), _identity(self.matrix)
        constant = self.matrix.detach()
        return 2 * self.matrix - constant, constant  # has the value of W, twice its gradient

    def probe(self, signs: Tensor) -> tuple[Tensor | float, Tensor]:
        return 1.0, signs @ self.matrix.T

    def pulled(self, rows: Tensor, product: Tensor | None = None) -> tuple[Tensor | float, Tensor]:
        if product is None:
            return 1.0, rows @ self.matrix
        if product.requires_grad:
            return 1.0, product
        attached: Tensor = _KnownProduct.apply(rows, self.matrix, product)
        return 1.0, attached

    def inner(self, rows: Tensor) -> Tensor:
        if self.by_unit:
            return (rows @ self.gram()) @ rows.mT
        pulled = rows @ self.matrix
        return pulled @ pulled.mT

    def square(self, g: Tensor) -> Tensor:
        if self.by_unit:
            square: Tensor = _ProductOfGrams.apply(self.matrix, g)
            return square.clamp_min(0)
        return (self.matrix.mT @ g).square().sum()

    def weight_probe(self, draw: Callable[[tuple[int, ...]], Tensor]) -> tuple[Tensor | float, Tensor]:
        # W Z with Z[k,t] = s_k r_{t-k}, whose entries are uncorrelated, as a circular convolution.
        signs, ring = draw((self.columns,)), draw((self.columns,))
        spectrum = torch.fft.rfft(self.matrix * signs) * torch.fft.rfft(ring)
        return 1.0, torch.fft.irfft(spectrum, n=self.columns)

    def variance(self, log_p: Tensor, by_row: Tensor) -> Tensor:
        # Logits may have been cast, down too: transformers computes losses in float32 whatever the model.
        dtype = torch.promote_types(log_p.dtype, self.matrix.dtype)
        return trace_of_covariance(log_p.to(dtype), self.matrix.to(dtype), by_row.to(dtype))


class _KnownProduct(torch.autograd.Function):
    """``x W`` of a constant x, as somebody has formed it, with its gradient in W."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, product: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return product.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None]:
        (x,) = ctx.saved_tensors
        return None, x.flatten(0, -2).mT @ grad.flatten(0, -2), None


class _ProductOfGrams(torch.autograd.Function):
    """``<W W^T, g g^T>`` of W, g ``(d, m)``.

    Cost: four products ``(d, d) x (d, m)`` with its gradient. Autograd would take six: it does not know that
    the two matrices are symmetric.
    """

    @staticmethod
    def forward(ctx: Any, w: Tensor, g: Tensor) -> Tensor:
        of_w, of_g = w @ w.T, g @ g.T
        ctx.save_for_backward(w, g, of_w, of_g)
        return (of_w * of_g).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        w, g, of_w, of_g = ctx.saved_tensors
        in_w, in_g = ctx.needs_input_grad
        return (2 * grad * of_g) @ w if in_w else None, (2 * grad * of_w) @ g if in_g else None


class Layerwise:
    """F = ||W||_F I ``(d, d)``."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix
        self.columns = self.directions = matrix.shape[0]
        self.square_norm = matrix.square().sum()

    def gram(self) -> Tensor:
        return self.square_norm * _identity(self.matrix)

    def pairs(self) -> tuple[Tensor, Tensor]:
        return self.gram(), _identity(self.matrix)

    def probe(self, signs: Tensor) -> tuple[Tensor | float, Tensor]:
        return self.square_norm, signs  # not ||W|| in v: the norm has no derivative at W = 0

    def pulled(self, rows: Tensor, product: Tensor | None = None) -> tuple[Tensor | float, Tensor]:
        return self.square_norm, rows

    def inner(self, rows: Tensor) -> Tensor:
        return self.square_norm * (rows @ rows.mT)

    def square(self, g: Tensor) -> Tensor:
        return self.square_norm * g.square().sum()

    def weight_probe(self, draw: Callable[[tuple[int, ...]], Tensor]) -> tuple[Tensor | float, Tensor]:
        return self.square_norm, draw(tuple(self.matrix.shape))

    def variance(self, log_p: Tensor, by_row: Tensor) -> Tensor:
        return self.square_norm * variance_of_indicator(log_p, by_row)


def _identity(matrix: Tensor) -> Tensor:
    return torch.eye(matrix.shape[0], dtype=matrix.dtype, device=matrix.device)


MEASURES: dict[str, type[Neuronwise] | type[Layerwise]] = {
    "neuronwise": Neuronwise,
    "layerwise": Layerwise,
}
