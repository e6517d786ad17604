"""A weight as the matrix W ``(d, m)``, one row per output neuron, however its layer stores it."""

from __future__ import annotations

import math
import sys
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from fam_optim.layer.convolution import TRANSPOSED
from fam_optim.layer.use import at_least_float32, describe, is_sharded

if TYPE_CHECKING:
    import torch


class WeightMatrix:
    """A parameter, and where the rows and columns of W lie in it.

    Args:
        parameter: of any shape with at least two dimensions.
        outputs: the axis along which the output neurons lie. The rows of W are the outputs, the columns
            everything else.
        groups: of a transposed convolution, whose outputs are counted within their group.
        name: for messages.

    Attributes:
        d, m: the shape of W.
    """

    def __init__(self, parameter: nn.Parameter, name: str, outputs: int = 0, groups: int = 1) -> None:
        self.parameter, self.name = parameter, name
        self._outputs, self._groups = outputs, groups
        self.d = parameter.shape[outputs] * groups
        self.m = parameter.numel() // max(self.d, 1)

    def of(self, t: Tensor) -> Tensor:
        """What has the parameter's shape as a matrix ``(d, m)``, in at least float32."""
        if not self._outputs:
            return at_least_float32(t).flatten(1)
        by_group = at_least_float32(t).reshape(self._grouped)
        return by_group.transpose(1, self._outputs + 1).reshape(self.d, self.m)

    def back(self, matrix: Tensor) -> Tensor:
        """A matrix ``(d, m)`` in the parameter's shape: the inverse of `of`."""
        if not self._outputs:
            return matrix.reshape(self.parameter.shape)
        shape = list(self._grouped)
        shape[1], shape[self._outputs + 1] = shape[self._outputs + 1], shape[1]
        return matrix.reshape(shape).transpose(1, self._outputs + 1).reshape(self.parameter.shape)

    @property
    def is_transposed(self) -> bool:
        """Whether a product takes the transpose of the parameter: it is stored as W itself."""
        return self._outputs == 0

    @property
    def is_hooked(self) -> bool:
        """Whether a hook of the user's changes the parameter's gradient, to freeze rows, say."""
        return bool(self.parameter._backward_hooks)

    @property
    def _grouped(self) -> torch.Size:
        first, *rest = self.parameter.shape
        return type(self.parameter.shape)((self._groups, first // self._groups, *rest))


def weight_matrix(layer: object) -> WeightMatrix:
    """The weight of a module, or a bare parameter, as a matrix.

    Args:
        layer: nn.Linear, a convolution or transposed convolution, Hugging Face's Conv1D, a subclass of these,
            or an nn.Parameter, whose rows lie along its first axis.

    Raises:
        TypeError: for anything else, for a weight that is computed at every call (a parametrization,
            pruning), and for one that is not whole on this process (FSDP, tensor parallelism).
    """
    name = describe(layer)
    if isinstance(layer, nn.Parameter):
        return _checked(WeightMatrix(layer, name) if layer.dim() > 1 else None, layer, name)
    if not isinstance(layer, nn.Module):
        raise TypeError(f"expected `layer` to be an nn.Module or an nn.Parameter, got {layer!r}.")
    module: nn.Module = getattr(layer, "_orig_mod", layer)  # torch.compile(module)
    outputs = _output_axis(module)
    weight = None if outputs is None else module._parameters.get("weight")  # a scripted one has no get
    if outputs is not None and is_computed(module):
        raise TypeError(
            f"mode='proximal' moves weights, and that of `layer` {name} is computed at every call (a "
            "parametrization, weight_norm, pruning). Leave this layer out, remove the parametrization, or "
            "use mode='hutchinson' with curvature='gauss_newton'."
        )
    if outputs is None or not isinstance(weight, nn.Parameter):
        raise TypeError(
            "expected `layer` to be nn.Linear, a convolution, a transposed convolution, Hugging Face's "
            f"Conv1D or an nn.Parameter with at least two dimensions, got {name}. Pass its weight, an "
            "nn.Parameter with one row per output."
        )
    groups = int(getattr(module, "groups", 1)) if isinstance(module, TRANSPOSED) else 1
    if isinstance(weight, nn.UninitializedParameter):
        raise TypeError(f"`layer` {name} has no weight yet. Run one batch through the model first.")
    return _checked(WeightMatrix(weight, name, outputs, groups), weight, name)


def is_computed(layer: object) -> bool:
    """Whether a module's weight is computed at every call."""
    module: Any = getattr(layer, "_orig_mod", layer)
    plain = not isinstance(layer, nn.Module) or module._parameters.get("weight") is not None
    return not plain and hasattr(module, "weight")


def _output_axis(module: nn.Module) -> int | None:
    """The axis of a module's weight along which its outputs lie; None if it has no weight matrix."""
    if isinstance(module, TRANSPOSED):
        return 1
    if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return 0
    transformers: Any = sys.modules.get("transformers.pytorch_utils")
    return 1 if transformers is not None and isinstance(module, transformers.Conv1D) else None


def _checked(found: WeightMatrix | None, weight: Tensor, name: str) -> WeightMatrix:
    if found is None or math.prod(weight.shape) == 0:
        raise TypeError(
            "expected `layer` to have a weight matrix (at least two dimensions, not empty), got a parameter "
            f"of shape {tuple(weight.shape)}. Pass the layer's weight, not its bias or a norm's scale."
        )
    if weight.is_complex():
        raise TypeError(
            f"expected `layer` to have a real weight, got {name} with a {weight.dtype} one. Leave it out."
        )
    if is_sharded(weight) or getattr(weight, "_fsdp_flattened", False):
        raise TypeError(
            f"mode='proximal' needs the whole weight of `layer` {name} on every process, and this one is "
            "sharded (FSDP, tensor parallelism). Use DDP, or with FSDP2 mode='hutchinson'."
        )
    return found
