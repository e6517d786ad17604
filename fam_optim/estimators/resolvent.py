"""``(I + 2 c T)^-1 W``, the minimum of ``<V V^T, T> + ||V - W||^2 / (2 c)`` over V, by one Cholesky solve.

T is positive semidefinite, so the factor shrinks W, along some directions, and never turns or lengthens it.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Dense:
    """T as a matrix ``(d, d)``."""

    def __init__(self, t: Tensor) -> None:
        self.t = t

    def times(self, w: Tensor) -> Tensor:
        """``T W``."""
        return self.t @ w

    def solve(self, twice_c: Tensor, w: Tensor) -> Tensor:
        """``(I + 2 c T)^-1 W``."""
        return _solve(twice_c, self.t, w)[0]


class LowRank:
    """T as ``A A^T``, A ``(d, q)`` with fewer columns than rows."""

    def __init__(self, a: Tensor) -> None:
        self.a = a

    def times(self, w: Tensor) -> Tensor:
        """``T W``."""
        return self.a @ (self.a.mT @ w)

    def solve(self, twice_c: Tensor, w: Tensor) -> Tensor:
        """``(I + 2 c T)^-1 W = W - 2 c A (I + 2 c A^T A)^-1 A^T W``."""
        solved, twice_c = _solve(twice_c, self.a.mT @ self.a, self.a.mT @ w)
        return w - twice_c * (self.a @ solved)


def _solve(twice_c: Tensor, t: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """``(I + 2 c t)^-1 w`` and 2 c, which is kept where rounding leaves the matrix positive definite.

    No eigenvalue is below 1, so nobody needs to wait for Cholesky's error flag.
    """
    diagonal = t.diagonal()
    largest = 1 / (len(t) * torch.finfo(t.dtype).eps * diagonal.sum())
    twice_c = torch.minimum(twice_c, largest)
    matrix = twice_c * t
    matrix.diagonal().add_(1)
    factor, _ = torch.linalg.cholesky_ex(matrix, check_errors=False)
    return torch.cholesky_solve(w, factor), twice_c
