"""What a regularised layer is: an operation linear in a weight matrix, ``z = lin(phi; W) + b``.

A `Use` is one evaluation of that operation. It knows the layer's input ``phi`` and weight and can
apply the operation to any other matrix; it knows no loss. The letters are

    W    (d, m)     one row per output neuron; convolutions: m = in channels / groups * kernel size
    phi             the layer's input, as the module received it
    z               the layer's output; its entries without the channel axis are the *rows*:
                    one per sample (Linear), token (Linear on sequences) or position (convolution)
"""

from __future__ import annotations

import copy
import math
import sys
import weakref
from functools import partial
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_CONV_TRANSPOSE = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


LOW_PRECISION = (torch.float16, torch.bfloat16)


def at_least_float32(t: Tensor) -> Tensor:
    """`t` in float32 if it is in a lower precision: second derivatives underflow in half precision."""
    return t.float() if t.dtype in LOW_PRECISION else t


class Use:
    """One use of a weight: ``z = lin(phi; W)``, here for a bare parameter, where z is W itself.

    Attributes:
        weight: the weight as used, attached to the graph, in the layer's own shape.
        shape: the shape of z.
        d, m: the shape of the weight matrix.
    """

    channel = 0
    has_rows = False  # whether z falls into rows that see W through one input vector each

    def __init__(self, weight: Tensor, shape: torch.Size | None = None) -> None:
        self.weight = weight
        self.shape = weight.shape if shape is None else shape

    @property
    def d(self) -> int:
        """Rows of the weight matrix."""
        return self.weight.shape[0]

    @property
    def m(self) -> int:
        """Columns of the weight matrix."""
        return math.prod(self.weight.shape[1:])

    def matrix(self) -> Tensor:
        """The weight as W ``(d, m)``, in at least float32."""
        return self.as_matrix(at_least_float32(self.weight))

    def as_matrix(self, weight: Tensor) -> Tensor:
        """What has the weight's own shape, or a derivative in it, as a matrix ``(d, m)``."""
        return weight.flatten(1)

    def lift(self, matrix: Tensor) -> Tensor:
        """``lin(phi; matrix)``: where a step of W along `matrix` ``(d, m)`` moves z."""
        return matrix.reshape(self.shape)

    def pull(self, delta: Tensor) -> Tensor:
        """``sum_a delta_a phi_a^T`` ``(d, m)``, the transpose of `lift`: a derivative in z as one in W."""
        return delta.flatten(1)

    def detached(self) -> Use:
        """This use with a constant input."""
        return self

    def check(self) -> None:
        """Raises RuntimeError if what was recorded is no longer what the graph was built with, TypeError if
        it never was."""


class LayerUse(Use):
    """One call of a module, recorded in its forward. Holds its input, hence lives with the graph."""

    has_rows = True

    def __init__(self, module: nn.Module, phi: Tensor, weight: Tensor, shape: torch.Size) -> None:
        if is_sharded(weight):  # FSDP2 has gathered its weights here, within the forward
            raise TypeError(tensor_parallel(module))
        if getattr(weight._base, "_is_flat_param", False):
            raise TypeError(
                f"`layer` {describe(module)} is wrapped in FullyShardedDataParallel (FSDP1), which frees "
                "weights that kappa still needs. Use FSDP2, torch.distributed.fsdp.fully_shard."
            )
        self.module = weakref.ref(module)
        self.holders: weakref.WeakSet[object] = weakref.WeakSet()  # who may still ask for kappa of it
        self.objection: str | None = None  # why kappa cannot be computed of it
        self.phi = phi
        self._versions = phi._version, weight._version
        super().__init__(weight, shape)

    def release(self, holder: object) -> None:
        """Lets go of the input when nobody needs it any more."""
        self.holders.discard(holder)
        if not self.holders:
            vars(self).pop("phi", None)

    @property
    def is_released(self) -> bool:
        """Whether the input is gone."""
        return "phi" not in vars(self)

    @property
    def input(self) -> Tensor:
        """phi, in at least float32."""
        return at_least_float32(self.phi)

    @property
    def lead(self) -> torch.Size:
        """Shape of z without its channel axis: the axes of its rows, the sample axis first."""
        shape = list(self.shape)
        del shape[self.channel]
        return torch.Size(shape)

    def rows(self) -> Tensor:
        """phi as the rows of z see it: ``(*lead, m)``; for convolutions, the patches."""
        raise NotImplementedError

    def squared_norms(self) -> Tensor:
        """``||phi_row||^2`` for every row of z: ``lead``."""
        raise NotImplementedError

    def again(self, bias: Tensor | None) -> Tensor:
        """z as the layer's class computes it from phi, the weight and `bias`."""
        raise NotImplementedError

    def pull(self, delta: Tensor) -> Tensor:
        with torch.enable_grad():
            zeros = delta.new_zeros(self.d, self.m, requires_grad=True)
            lifted = self.lift(zeros)
            attached = delta.requires_grad or self.input.requires_grad
            (pulled,) = torch.autograd.grad(lifted, zeros, delta, create_graph=attached)
        return pulled

    def detached(self) -> LayerUse:
        use = copy.copy(self)
        use.phi = self.phi.detach()
        return use

    def check(self) -> None:
        if self.objection is not None:
            raise TypeError(self.objection)
        phi, weight = self._versions
        if self.weight._version != weight:
            raise RuntimeError(
                f"the weight of the observed layer {describe(self.module())} was modified in place after the "
                "forward, so kappa of this loss cannot be computed any more. Compute it, or regularise, "
                "before anything changes the weight: a step, load_state_dict, the swap of an average."
            )
        if self.phi._version != phi:
            raise RuntimeError(
                f"the input of the observed layer {describe(self.module())} was modified in place after "
                "the layer had used it, so kappa cannot be computed from it. Use an out-of-place "
                "operation instead (x = x + layer(x), not x += layer(x))."
            )


class LinearUse(LayerUse):
    """``z = phi W^T``: phi ``(..., m)``, z ``(..., d)``."""

    channel = -1

    def lift(self, matrix: Tensor) -> Tensor:
        return F.linear(self.input, matrix)

    def pull(self, delta: Tensor) -> Tensor:
        return delta.reshape(-1, self.d).mT @ self.input.reshape(-1, self.m).to(delta.dtype)

    def again(self, bias: Tensor | None) -> Tensor:
        return F.linear(self.phi, self.weight, bias)

    def rows(self) -> Tensor:
        return self.input

    def squared_norms(self) -> Tensor:
        return self.input.square().sum(-1)


class Conv1DUse(LinearUse):
    """Hugging Face's Conv1D: the weight is stored as ``W^T (m, d)``."""

    @property
    def d(self) -> int:
        return self.weight.shape[1]

    @property
    def m(self) -> int:
        return self.weight.shape[0]

    def as_matrix(self, weight: Tensor) -> Tensor:
        return weight.mT

    def again(self, bias: Tensor | None) -> Tensor:
        assert bias is not None
        flat = torch.addmm(bias, self.phi.view(-1, self.m), self.weight)
        return flat.view(*self.phi.shape[:-1], self.d)


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

    def again(self, bias: Tensor | None) -> Tensor:
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

    def again(self, bias: Tensor | None) -> Tensor:
        return self._transposed(self.phi, self.weight, bias)

    def _filtered(self, channels: Tensor, filters: Tensor) -> Tensor:
        return self._transposed(channels, filters.unsqueeze(0), None)

    def _transposed(self, phi: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return _CONV_TRANSPOSE[weight.dim() - 2](
            phi, weight, bias, self.stride, self.padding, self.output_padding, self.groups, self.dilation
        )


def is_sharded(weight: Tensor) -> bool:
    """Whether `weight` is a DTensor; without importing what the user has not."""
    tensor = sys.modules.get("torch.distributed.tensor")
    return tensor is not None and isinstance(weight, tensor.DTensor)


def tensor_parallel(module: nn.Module) -> str:
    """Why a layer that is tensor parallel is refused."""
    return (
        f"`layer` {describe(module)} is tensor parallel: no process has its whole weight, input and output, "
        "which kappa needs. Leave the layer out of the plan of parallelize_module; what comes before it may "
        "be tensor parallel. (Weights sharded by FSDP2, fully_shard, are supported.)"
    )


def describe(layer: object) -> str:
    """`layer` as the user wrote it, for error messages."""
    if isinstance(layer, Tensor):
        return f"{type(layer).__name__} of shape {tuple(layer.shape)}"
    text = str(layer)
    return type(layer).__name__ if "\n" in text else text
