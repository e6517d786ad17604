"""Where the rows and columns of the matrix W ``(d, m)`` lie in a weight, however its layer stores it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Layout(NamedTuple):
    """A weight's own shape, and how it is read: one row per output neuron, its columns everything else.

    Attributes:
        shape: ``(d, ...)``, or ``(inputs, d / groups, ...)``.
        inputs_first: whether it is the latter: of a transposed convolution, of Hugging Face's Conv1D.
        groups: of a transposed convolution, whose outputs are counted within their group.
    """

    shape: torch.Size
    inputs_first: bool = False
    groups: int = 1

    @property
    def d(self) -> int:
        """Rows of W."""
        return self.shape[1] * self.groups if self.inputs_first else self.shape[0]

    @property
    def m(self) -> int:
        """Columns of W."""
        first, second, *kernel = self.shape
        return math.prod((first // self.groups if self.inputs_first else second, *kernel))

    def matrix(self, t: Tensor) -> Tensor:
        """What has the weight's own shape as a matrix ``(d, m)``."""
        if not self.inputs_first:
            return t.flatten(1)
        by_group = t.reshape(self.groups, -1, *t.shape[1:])
        return by_group.transpose(1, 2).flatten(0, 1).flatten(1)

    def weight(self, matrix: Tensor) -> Tensor:
        """A matrix ``(d, m)`` as the weight is stored: the inverse of `matrix`. With fewer rows the weight of
        fewer outputs."""
        inputs, *rest = self.shape
        if not self.inputs_first:
            return matrix.reshape(-1, *rest)
        by_group = matrix.reshape(self.groups, -1, inputs // self.groups, *rest[1:])
        return by_group.transpose(1, 2).flatten(0, 1)
