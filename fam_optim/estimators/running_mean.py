"""T over the due steps of a training: the running mean of ``A A^T``, for several weights by number.

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
        kept: by weight, T ``(d, d)``, or the last A side by side ``(d, 4 q)``.
    """

    def __init__(self) -> None:
        self.kept: dict[int, Tensor] = {}

    def add(self, numbers: list[int], a: Tensor, w: Tensor) -> tuple[Dense | LowRank, Tensor]:
        """The means of weights of one shape with ``A A^T`` in them, A ``(weights, d, q)``, beside their W;
        and ``||A^T W||_F^2``, the sum over the weights.

        An A that is zero, for want of a finite one, only scales the mean.
        """
        old = [self.kept[i] for i in numbers if i in self.kept]
        before = stack(old) if old else None
        d, q = a.shape[-2:]
        t: Dense | LowRank
        if FACTORS * q < d:
            new = a if before is None else torch.cat([before, a], -1)[..., -FACTORS * q :]
            t = narrow = LowRank(new, w)
            kappa = narrow.at_w[..., -q:, :].square().sum()
        else:
            squared = a @ a.mT
            new = (1 - KEPT) * squared if before is None else torch.lerp(before, squared, 1 - KEPT)
            t = Dense(new, w)
            kappa = (squared @ w * w).sum() if q > d else (a.mT @ w).square().sum()
        self.kept.update(zip(numbers, new, strict=True))
        return t, kappa


def stack(tensors: list[Tensor]) -> Tensor:
    """Several of one shape in one; a single one is not copied."""
    return torch.stack(tensors) if len(tensors) > 1 else tensors[0][None]
