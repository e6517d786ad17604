"""T over the due steps of a training (every tenth, say): the running mean of ``A A^T``, for several weights.

``T <- 3/4 T + 1/4 A A^T``, or, where four A are smaller together than T ``(d, d)``, the mean over the last
four. Only its direction counts: a factor, such as a correction at the start, is undone by the length of the
proximal step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fam_optim.estimators.resolvent import Dense, LowRank

KEPT = 0.75
"""Part of the mean that a due step keeps."""
FACTORS = 4
"""How many A are kept in place of T."""


class RunningMean:
    """The means of some weights.

    Attributes:
        kept: by weight, T ``(d, d)``, or the last A side by side ``(d, 4 q)``, zero at the start.
    """

    def __init__(self) -> None:
        self.kept: dict[int, Tensor] = {}

    def add(self, numbers: list[int], a: Tensor, w: Tensor, live: Tensor) -> tuple[Dense | LowRank, Tensor]:
        """The means of weights of one shape with ``A A^T`` in them, A ``(weights, d, q)``, beside their W;
        and ``||A^T W||_F^2``, the sum over the weights.

        Args:
            live: by weight, whether A counts; where it does not, A is zero and the mean stays.
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
