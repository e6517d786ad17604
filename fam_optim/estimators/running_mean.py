"""T over the due steps of a training (every tenth, say): the running mean of ``A A^T``, and the minimum
``(I + 2 c T)^-1 W`` that it gives, for several weights.

``T <- 3/4 T + 1/4 A A^T``, or, where four A are smaller together than T ``(d, d)``, the mean over the last
four. Only its direction counts: a factor, such as a correction at the start, is undone by the length of the
proximal step. T is positive semidefinite, so the step shrinks W along some directions and lengthens it along
none. Tensors may be of several weights of one shape, ``(..., d, m)``, which are solved at once.
"""

from __future__ import annotations

import torch
from torch import Tensor

KEPT = 0.75
"""Part of the mean that a due step keeps."""
FACTORS = 4
"""How many A are kept in place of T."""


class Dense:
    """T as a matrix ``(d, d)``, with W ``(d, m)``."""

    def __init__(self, t: Tensor, w: Tensor) -> None:
        self.t, self.w = t, w
        self.pull = frobenius(t @ w)  # ||T W||_F

    def solve(self, twice_c: Tensor) -> Tensor:
        """``(I + 2 c T)^-1 W``."""
        return _solve(twice_c, self.t, self.w)[0]


class LowRank:
    """T as ``A A^T``, A ``(d, q)`` with fewer columns than rows, with W ``(d, m)``."""

    def __init__(self, a: Tensor, w: Tensor) -> None:
        self.a, self.w = a, w
        self.gram, self.at_w = a.mT @ a, a.mT @ w
        squared = (self.at_w * (self.gram @ self.at_w)).sum((-2, -1))
        self.pull = squared.clamp_min(0).sqrt()  # ||T W||_F

    def solve(self, twice_c: Tensor) -> Tensor:
        """``(I + 2 c T)^-1 W = W - 2 c A (I + 2 c A^T A)^-1 A^T W``."""
        solved, twice_c = _solve(twice_c, self.gram, self.at_w)
        return self.w - self.a @ (twice_c[..., None, None] * solved)


class RunningMean:
    """The means of some weights."""

    def __init__(self) -> None:
        self.kept: dict[int, Tensor] = {}  # T (d, d), or the last A side by side (d, 4 q), zero at the start

    def add(self, numbers: list[int], a: Tensor, w: Tensor, live: Tensor) -> tuple[Dense | LowRank, Tensor]:
        """The means of weights of one shape with ``A A^T`` in them, A ``(weights, d, q)``, beside their W;
        and ``||A^T W||_F^2``, the sum over the weights. Where A is not `live` it is zero, and the mean stays.
        """
        d, q = a.shape[-2:]
        shape = shape_of_mean(d, q)
        old = [self.kept[i].to(a) if i in self.kept else a.new_zeros(shape) for i in numbers]
        before, live = stack(old), live[:, None, None]
        t: Dense | LowRank
        if shape[1] < d:
            new = torch.where(live, torch.cat([before[..., q:], a], -1), before)
            t, kappa = LowRank(new, w), (a.mT @ w).square().sum()
        else:
            squared = a @ a.mT
            new = torch.lerp(before, squared, (1 - KEPT) * live.to(a))
            t = Dense(new, w)
            kappa = (squared @ w * w).sum() if q > d else (a.mT @ w).square().sum()
        self.kept.update(zip(numbers, new, strict=True))
        return t, kappa


def shape_of_mean(d: int, q: int) -> tuple[int, int]:
    """Of T, or of the last A side by side, whichever is smaller."""
    return (d, FACTORS * q if FACTORS * q < d else d)


def stack(tensors: list[Tensor]) -> Tensor:
    """Several of one shape in one; a single one is not copied."""
    return torch.stack(tensors) if len(tensors) > 1 else tensors[0][None]


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
