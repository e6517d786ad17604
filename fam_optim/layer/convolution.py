"""Convolutions and transposed convolutions as ``z = lin(phi; W) + b``."""

from __future__ import annotations

import copy
import math
from functools import partial
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fam_optim.layer.use import LayerUse

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_CONV_TRANSPOSE = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


class ConvUse(LayerUse):
    """Convolution: phi ``([N,] channels, *space)``, z ``([N,] d, *space')``."""

    def __init__(self, module: nn.Module, phi: Tensor, weight: Tensor, shape: torch.Size) -> None:
        super().__init__(module, phi, weight, shape)
        # Of the class, padding modes included: a subclass may compute something else.
        kind = cast(type[nn.Conv2d], next(kind for kind in CONVOLUTIONS if isinstance(module, kind)))
        self.convolve: Callable[[Tensor, Tensor, Tensor | None], Tensor] = partial(
            kind._conv_forward, cast(nn.Conv2d, module)
        )
        self.channel = len(shape) - weight.dim() + 1
        self.has_rows = bool(module.groups == 1)

    def lift(self, matrix: Tensor) -> Tensor:
        kernel = matrix.reshape(-1, *self.weight.shape[1:])
        return self.convolve(self.input, kernel, None)

    def forward(self, bias: Tensor | None) -> Tensor:
        return self.convolve(self.phi, self.weight, bias)

    def rows(self) -> Tensor:
        # One-hot filters read the patches off, whatever stride, padding, dilation; every channel by itself.
        kernel = self.weight.shape[2:]
        one_hot = torch.eye(math.prod(kernel), dtype=self.input.dtype, device=self.phi.device)
        channels = self.input.reshape(-1, 1, *self.input.shape[-len(kernel) :])
        patches = self._filtered(channels, one_hot.reshape(-1, *kernel))
        of_position = patches.reshape(*self.lead[: self.channel], self.m, *self.lead[self.channel :])
        return of_position.movedim(self.channel, -1)

    def _filtered(self, channels: Tensor, filters: Tensor) -> Tensor:
        """Images of one channel through filters ``(filters, *kernel)``."""
        return self.convolve(channels, filters.unsqueeze(1), None)

    def squared_norms(self) -> Tensor:
        ones = self.input.new_ones(1, self.m)
        squared = copy.copy(self)
        squared.phi = self.input.square()  # padding copies entries, so it commutes with squaring them
        return squared.lift(ones).squeeze(self.channel)


class ConvTransposeUse(ConvUse):
    """Transposed convolution. torch stores the weight as (in, d / groups, *kernel)."""

    def __init__(self, module: nn.Module, phi: Tensor, weight: Tensor, shape: torch.Size) -> None:
        self.stride: Sequence[int] = module.stride  # type: ignore[assignment]
        self.padding: Sequence[int] = module.padding  # type: ignore[assignment]
        self.dilation: Sequence[int] = module.dilation  # type: ignore[assignment]
        self.groups: int = module.groups  # type: ignore[assignment]
        LayerUse.__init__(self, module, phi, weight, shape)
        self.channel = len(shape) - weight.dim() + 1
        self.has_rows = self.groups == 1
        # forward(output_size=...) picks the padding per call, so it is read off the output's shape.
        space = weight.dim() - 2
        self.output_padding = [
            out - ((size - 1) * s - 2 * p + dil * (k - 1) + 1)
            for out, size, s, p, dil, k in zip(
                shape[-space:],
                phi.shape[-space:],
                self.stride,
                self.padding,
                self.dilation,
                weight.shape[2:],
                strict=True,
            )
        ]

    @property
    def d(self) -> int:
        return self.weight.shape[1] * self.groups

    @property
    def m(self) -> int:
        inputs, _, *kernel = self.weight.shape
        return inputs // self.groups * math.prod(kernel)

    def as_matrix(self, weight: Tensor) -> Tensor:
        # (groups, in/groups, d/groups, *kernel)
        by_group = weight.reshape(self.groups, -1, *weight.shape[1:])
        return by_group.transpose(1, 2).flatten(0, 1).flatten(1)

    def lift(self, matrix: Tensor) -> Tensor:
        inputs, _, *kernel = self.weight.shape
        by_group = matrix.reshape(self.groups, -1, inputs // self.groups, *kernel)
        return self._transposed(self.input, by_group.transpose(1, 2).flatten(0, 1), None)

    def forward(self, bias: Tensor | None) -> Tensor:
        return self._transposed(self.phi, self.weight, bias)

    def _filtered(self, channels: Tensor, filters: Tensor) -> Tensor:
        return self._transposed(channels, filters.unsqueeze(0), None)

    def _transposed(self, phi: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return _CONV_TRANSPOSE[weight.dim() - 2](
            phi, weight, bias, self.stride, self.padding, self.output_padding, self.groups, self.dilation
        )
