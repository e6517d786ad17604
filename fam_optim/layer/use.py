"""What a regularised layer is: an operation linear in a weight matrix, ``z = lin(phi; W) + b``.

A `Use` is one evaluation of that operation. It can apply the operation to any other matrix and knows no loss.

    W    (d, m)     one row per output neuron; convolutions: m = in channels / groups * kernel size
    phi             the layer's input, as the module received it
    z               the layer's output; its entries without the channel axis are the *rows*:
                    one per sample (Linear), token (Linear on sequences) or position (convolution)
"""

import copy
import math
import sys
import weakref
from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LOW_PRECISION = (torch.float16, torch.bfloat16)
COMPLEX = (
    "expected a real weight, got that of {} in {}, of which relative flatness is not defined. Hold its real "
    "and imaginary part as two layers, or leave it out."
)
TENSOR_PARALLEL = (
    "`layer` {} is tensor parallel: no process has its whole weight, input and output, which kappa needs. "
    "Leave the layer out of the plan of parallelize_module. (FSDP2 is supported.)"
)


def at_least_float32(t: Tensor) -> Tensor:
    """Returns `t`, in float32 if its precision is lower: second derivatives underflow in half precision."""
    return t.float() if t.dtype in LOW_PRECISION else t


class Layout(NamedTuple):
    """A weight's own shape ``(d, ...)``, and how it is read as the matrix W, with one row per output neuron.
    For transposed convolutions and Hugging Face's Conv1D it is ``(inputs, outputs of a group, ...)``."""

    shape: torch.Size
    inputs_first: bool = False
    groups: int = 1

    @property
    def d(self) -> int:
        """The number of rows of W."""
        return self.shape[1] * self.groups if self.inputs_first else self.shape[0]

    @property
    def m(self) -> int:
        """The number of columns of W."""
        first, second, *kernel = self.shape
        return math.prod((first // self.groups if self.inputs_first else second, *kernel))

    def matrix(self, t: Tensor) -> Tensor:
        """Returns a tensor in the weight's own shape as a matrix ``(d, m)``."""
        if not self.inputs_first:
            return t.flatten(1)
        by_group = t.reshape(self.groups, -1, *t.shape[1:])
        return by_group.transpose(1, 2).flatten(0, 1).flatten(1)

    def weight(self, matrix: Tensor) -> Tensor:
        """Returns a matrix ``(d, m)`` as the weight is stored; fewer rows are the weight of fewer outputs."""
        inputs, *rest = self.shape
        if not self.inputs_first:
            return matrix.reshape(-1, *rest)
        by_group = matrix.reshape(self.groups, -1, inputs // self.groups, *rest[1:])
        return by_group.transpose(1, 2).flatten(0, 1)


class Use:
    """One use of a weight, ``z = lin(phi; W)``. This class is for a bare parameter, where z is W itself."""

    channel = 0
    has_rows = False  # whether z falls into rows that see W through one input vector each

    def __init__(self, weight: Tensor, shape: torch.Size | None = None, layout: Layout | None = None) -> None:
        self.weight = weight  # as used, attached to the graph, in the layer's own shape
        self.shape = weight.shape if shape is None else shape  # of z
        self.layout = layout or Layout(weight.shape)  # how the weight is read as a matrix
        self.d, self.m = self.layout.d, self.layout.m

    def matrix(self) -> Tensor:
        """Returns the weight as W ``(d, m)``, in at least float32."""
        return self.layout.matrix(at_least_float32(self.weight))

    def lift(self, matrix: Tensor) -> Tensor:
        """Returns ``lin(phi; matrix)``: how z moves when W moves by `matrix` ``(d, m)``."""
        return matrix.reshape(self.shape)

    def pull(self, delta: Tensor) -> Tensor:
        """Turns a derivative in z into one in W, ``sum_a delta_a phi_a^T`` ``(d, m)``: `lift` transposed."""
        return delta.flatten(1)

    def detached(self) -> "Use":
        """Returns this use with a constant input."""
        return self

    def check(self) -> None:
        """Raises TypeError if this use has no kappa, RuntimeError if weight or input has changed since."""


class LayerUse(Use):
    """One call of a module, recorded in its forward. It holds the call's input and lives with the graph."""

    has_rows = True
    inputs_first = False

    def __init__(self, module: nn.Module, phi: Tensor, weight: Tensor, shape: torch.Size) -> None:
        if is_sharded(weight):  # those of FSDP2 are whole here, within the forward
            raise TypeError(TENSOR_PARALLEL.format(describe(module)))
        if getattr(weight._base, "_is_flat_param", False):
            raise TypeError(
                f"`layer` {describe(module)} is wrapped in FullyShardedDataParallel (FSDP1), which frees "
                "weights that kappa still needs. Use FSDP2, torch.distributed.fsdp.fully_shard."
            )
        self.module = weakref.ref(module)
        self.holders: weakref.WeakSet[object] = weakref.WeakSet()  # who may still ask for kappa of this call
        self.objection: str | None = None  # why kappa cannot be computed of this call
        if weight.is_complex():
            self.objection = COMPLEX.format(f"`layer` {describe(module)}", weight.dtype)
        elif phi.is_nested or phi.layout != torch.strided:
            self.objection = (
                f"the input of `layer` {describe(module)} is a nested or sparse tensor ({phi.layout}), whose "
                "rows kappa does not know. Give the layer a plain tensor (x.to_dense(), "
                "x.to_padded_tensor(0)), or pass its weight, an nn.Parameter, with mode='hutchinson'."
            )
        self.phi = phi
        self._versions = phi._version, weight._version
        super().__init__(weight, shape, self.layout_of(module, weight))

    @classmethod
    def layout_of(cls, module: nn.Module, weight: Tensor) -> Layout:
        """Returns how a weight of the module is read as a matrix."""
        return Layout(weight.shape, cls.inputs_first, getattr(module, "groups", 1))

    def release(self, holders: Iterable[object]) -> None:
        """Removes holders, and drops the input if none is left."""
        self.holders.difference_update(holders)
        if not self.holders:
            vars(self).pop("phi", None)

    @property
    def input(self) -> Tensor:
        """phi, in at least float32."""
        return at_least_float32(self.phi)

    @property
    def lead(self) -> torch.Size:
        """The shape of z without its channel axis: the axes of its rows, the sample axis first."""
        shape = list(self.shape)
        del shape[self.channel]
        return torch.Size(shape)

    def rows(self) -> Tensor:
        """Returns the input of each row of z, ``(*lead, m)``; for convolutions, the patches of phi."""
        raise NotImplementedError

    def squared_norms(self) -> Tensor:
        """Returns ``||phi_a||^2`` for every row a of z, in the shape ``lead``."""
        return self.rows().square().sum(-1)

    def operation(self, phi: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Returns z as the layer's class computes it, from any phi, weight and bias."""
        raise NotImplementedError

    def lift(self, matrix: Tensor) -> Tensor:
        return self.operation(self.input, self.layout.weight(matrix), None)

    def pull(self, delta: Tensor) -> Tensor:
        with torch.enable_grad():
            zeros = delta.new_zeros(self.d, self.m, requires_grad=True)
            lifted = self.lift(zeros)
            attached = delta.requires_grad or self.input.requires_grad
            (pulled,) = torch.autograd.grad(lifted, zeros, delta, create_graph=attached)
        return pulled

    def detached(self) -> "LayerUse":
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
                "forward. Compute kappa, or regularise, before the weight changes (a step, load_state_dict)."
            )
        if self.phi._version != phi:
            raise RuntimeError(
                f"the input of the observed layer {describe(self.module())} was modified in place after the "
                "forward, and kappa needs it. Modify a copy (x = x + layer(x), not x += layer(x))."
            )


class LinearUse(LayerUse):
    """``z = phi W^T``: phi ``(..., m)``, z ``(..., d)``."""

    channel = -1

    def operation(self, phi: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(phi, weight, bias)

    def pull(self, delta: Tensor) -> Tensor:
        return delta.reshape(-1, self.d).mT @ self.input.reshape(-1, self.m).to(delta.dtype)

    def rows(self) -> Tensor:
        return self.input


class Conv1DUse(LinearUse):
    """Hugging Face's Conv1D: the weight is stored as ``W^T (m, d)``."""

    inputs_first = True

    def operation(self, phi: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if bias is None:
            return phi @ weight
        return torch.addmm(bias, phi.view(-1, self.m), weight).view(*phi.shape[:-1], self.d)


def is_sharded(weight: Tensor) -> bool:
    """Returns whether `weight` is a DTensor, without importing what the user has not imported."""
    tensor = sys.modules.get("torch.distributed.tensor")
    return tensor is not None and isinstance(weight, tensor.DTensor)


def describe(layer: object) -> str:
    """Returns `layer` as the user wrote it, for error messages."""
    if isinstance(layer, Tensor):
        return f"{type(layer).__name__} of shape {tuple(layer.shape)}"
    text = str(layer)
    return type(layer).__name__ if "\n" in text else text
