"""Convolutions and transposed convolutions as ``z = lin(phi; W) + b``."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fam_optim.layer.use import LayerUse

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


class ConvUse(LayerUse):
    """Convolution: phi ``([N,] channels, *space)``, z ``([N,] d, *space')``."""

    def __init__(self, module: nn.Module, phi: Tensor, weight: Tensor, shape: torch.Size) -> None:
        super().__init__(module, phi, weight, shape)
        self.operation = self._convolution(module)  # type: ignore[method-assign]
        self.channel = len(shape) - weight.dim() + 1
        self.has_rows = bool(module.groups == 1)

    def _convolution(self, module: Any) -> Callable[..., Tensor]:
        """Returns the convolution of an input with a weight and a bias, with the module's settings."""
        # The class's own, padding modes included: a subclass may compute something else.
        kind: Any = next(kind for kind in CONVOLUTIONS if isinstance(module, kind))
        return partial(kind._conv_forward, module)

    def rows(self) -> Tensor:
        # One-hot filters read off the patches channel by channel, whatever the stride, padding and dilation.
        kernel = self.weight.shape[2:]
        one_hot = torch.eye(math.prod(kernel), dtype=self.input.dtype, device=self.phi.device)
        filters = one_hot.reshape(-1, *kernel).unsqueeze(0 if self.inputs_first else 1)
        channels = self.input.reshape(-1, 1, *self.input.shape[-len(kernel) :])
        patches = self.operation(channels, filters, None)
        of_position = patches.reshape(*self.lead[: self.channel], self.m, *self.lead[self.channel :])
        return of_position.movedim(self.channel, -1)

    def squared_norms(self) -> Tensor:
        ones = self.layout.weight(self.input.new_ones(1, self.m))
        # Padding copies entries, so it commutes with squaring them.
        return self.operation(self.input.square(), ones, None).squeeze(self.channel)


class ConvTransposeUse(ConvUse):
    """Transposed convolution. torch stores the weight as (in, d / groups, *kernel)."""

    inputs_first = True

    def _convolution(self, module: Any) -> Callable[..., Tensor]:
        kernel = self.weight.shape[2:]
        settings = {name: getattr(module, name) for name in ("stride", "padding", "dilation")}
        lengths = self.shape[-len(kernel) :], self.phi.shape[-len(kernel) :], kernel
        along = zip(*lengths, *settings.values(), strict=True)
        # forward(output_size=...) picks the padding per call, so it is read off the output's shape.
        extra = [out - ((size - 1) * s - 2 * p + d * (k - 1) + 1) for out, size, k, s, p, d in along]
        function = getattr(F, f"conv_transpose{len(kernel)}d")
        return partial(function, output_padding=extra, groups=module.groups, **settings)
