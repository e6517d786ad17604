"""The curvature T is the running mean of ``A A^T`` over the due steps of a training (say, every tenth step).

Each due step sets ``T <- 3/4 T + 1/4 A A^T``. Where four A together are smaller than T ``(d, d)``, it keeps
the last four A, and T is the sum of their ``A A^T``. The scale of T does not matter, since the step length c
divides it out; so the mean needs no correction at the start. T is positive semidefinite, so the proximal step
``(I + 2 c T)^-1 W`` shrinks W along some directions and lengthens it along none. Tensors ``(..., d, m)`` may
hold several weights of one shape, which are solved together.
"""

import torch
from torch import Tensor

KEPT = 0.75  # the fraction of the mean that a due step keeps
FACTORS = 4  # the number of A that are kept in place of T


class Dense:
    """Holds T as a matrix ``(d, d)``, and W ``(d, m)``."""

    def __init__(self, t: Tensor, w: Tensor) -> None:
        self.t, self.w = t, w
        self.pull = torch.linalg.matrix_norm(t @ w)  # ||T W||_F

    def solve(self, twice_c: Tensor) -> Tensor:
        """Returns ``(I + 2 c T)^-1 W``."""
        return _solve(twice_c, self.t, self.w)[0]


class LowRank:
    """Holds T as ``A A^T``, with A ``(d, q)`` that has fewer columns than rows, and W ``(d, m)``."""

    def __init__(self, a: Tensor, w: Tensor) -> None:
        self.a, self.w = a, w
        self.gram, self.at_w = a.mT @ a, a.mT @ w
        squared = (self.at_w * (self.gram @ self.at_w)).sum((-2, -1))
        self.pull = squared.clamp_min(0).sqrt()  # ||T W||_F

    def solve(self, twice_c: Tensor) -> Tensor:
        """Returns ``(I + 2 c T)^-1 W = W - 2 c A (I + 2 c A^T A)^-1 A^T W``."""
        solved, twice_c = _solve(twice_c, self.gram, self.at_w)
        return torch.baddbmm(self.w, self.a, twice_c[:, None, None] * solved, alpha=-1)


class RunningMean:
    """Keeps the running mean T of each of several weights."""

    def __init__(self) -> None:
        self.kept: dict[int, Tensor] = {}  # T (d, d), or the last A side by side (d, 4 q), zero at the start

    def add(self, numbers: list[int], a: Tensor, w: Tensor, live: Tensor) -> tuple[Dense | LowRank, Tensor]:
        """Adds A ``(weights, d, q)`` to the means of weights of one shape; returns the new means, with W,
        and the sum of ``||A^T W||_F^2``. A weight whose A is not `live` (then A is 0) keeps its mean."""
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

    def load(self, kept: dict[int, Tensor], shapes: list[tuple[int, int]]) -> None:
        """Takes over the means of a checkpoint; ValueError if these weights have means of other `shapes`."""
        saved = {i: tuple(mean.shape) for i, mean in kept.items()}
        if not saved.items() <= dict(enumerate(shapes)).items():
            raise ValueError(
                "expected a checkpoint of the same layers and n_samples, with means of the shapes "
                f"{shapes}; it has {saved}. Build FAM with the layers and n_samples that it was saved with."
            )
        self.kept = {i: mean.clone() for i, mean in kept.items() if mean.any()}


def shape_of_mean(d: int, q: int) -> tuple[int, int]:
    """Returns the shape of T, or that of the last four A side by side if this is smaller."""
    return (d, FACTORS * q if FACTORS * q < d else d)


def stack(tensors: list[Tensor]) -> Tensor:
    """Stacks tensors of one shape along a new first axis; does not copy a single one."""
    return torch.stack(tensors) if len(tensors) > 1 else tensors[0][None]


def _solve(twice_c: Tensor, t: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """Returns ``(I + 2 c t)^-1 w``, and 2 c lowered so that rounding leaves the matrix positive definite. No
    eigenvalue is below 1, so there is no need to wait for Cholesky's error flag, and multiplying by the
    inverse is as accurate as a solve. It is faster than a solve unless w has far fewer columns than rows."""
    trace = t.diagonal(dim1=-2, dim2=-1).sum(-1)
    largest = 1 / (t.shape[-1] * torch.finfo(t.dtype).eps * trace)
    twice_c = torch.minimum(twice_c, largest)
    matrix = twice_c[..., None, None] * t
    matrix.diagonal(dim1=-2, dim2=-1).add_(1)
    factor, _ = torch.linalg.cholesky_ex(matrix, check_errors=False)
    if 2 * w.shape[-1] <= w.shape[-2]:
        return torch.cholesky_solve(w, factor), twice_c
    inverse = torch.cholesky_inverse(factor)
    inverse.diagonal(dim1=-2, dim2=-1).sub_(1)  # so that a less precise product (TF32) rounds only the change
    return torch.baddbmm(w, inverse, w), twice_c
