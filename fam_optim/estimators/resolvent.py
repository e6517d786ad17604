"""``(I + 2 c T)^-1 W``, the minimum of ``<V V^T, T> + ||V - W||^2 / (2 c)`` over V, by one Cholesky solve.

T is positive semidefinite, so the factor shrinks W along some directions and lengthens it along none. Tensors
may be of several weights of one shape, ``(..., d, m)``, which are solved at once.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Dense:
    """T as a matrix ``(d, d)``, with W ``(d, m)``.

    Attributes:
        pull: ``||T W||_F``.
    """

    def __init__(self, t: Tensor, w: Tensor) -> None:
        self.t, self.w = t, w
        self.pull = frobenius(t @ w)

    def solve(self, twice_c: Tensor) -> Tensor:
        """``(I + 2 c T)^-1 W``."""
        return _solve(twice_c, self.t, self.w)[0]


class LowRank:
    """T as ``A A^T``, A ``(d, q)`` with fewer columns than rows, with W ``(d, m)``.

    Attributes:
        pull: ``||T W||_F``.
    """

    def __init__(self, a: Tensor, w: Tensor) -> None:
        self.a, self.w = a, w
        self.gram, self.at_w = a.mT @ a, a.mT @ w
        squared = (self.at_w * (self.gram @ self.at_w)).sum((-2, -1))
        self.pull = squared.clamp_min(0).sqrt()

    def solve(self, twice_c: Tensor) -> Tensor:
        """``(I + 2 c T)^-1 W = W - 2 c A (I + 2 c A^T A)^-1 A^T W``."""
        solved, twice_c = _solve(twice_c, self.gram, self.at_w)
        return self.w - self.a @ (twice_c[..., None, None] * solved)


def frobenius(t: Tensor) -> Tensor:
    """The norm of every matrix."""
    norms: Tensor = t.flatten(-2).norm(dim=-1)
    return norms


def _solve(twice_c: Tensor, t: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """``(I + 2 c t)^-1 w`` and 2 c, which is kept where rounding leaves the matrix positive definite.

    No eigenvalue is below 1, so nobody needs to wait for Cholesky's error flag, and the inverse by itself is
    as accurate as a solve. It takes less time unless w has far fewer columns than rows.
    """
    trace = t.diagonal(dim1=-2, dim2=-1).sum(-1)
    largest = 1 / (t.shape[-1] * torch.finfo(t.dtype).eps * trace)
    twice_c = torch.minimum(twice_c, largest)
    matrix = twice_c[..., None, None] * t
    matrix.diagonal(dim1=-2, dim2=-1).add_(1)
    factor, _ = torch.linalg.cholesky_ex(matrix, check_errors=False)
    if 2 * w.shape[-1] <= w.shape[-2]:
        return torch.cholesky_solve(w, factor), twice_c
    return torch.cholesky_inverse(factor) @ w, twice_c
