"""A weight that the proximal step moves: a parameter, as the matrix W ``(d, m)`` of its layer."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from torch import nn

from fam_optim.layer.kinds import check_matrix, use_type
from fam_optim.layer.layout import Layout
from fam_optim.layer.use import at_least_float32, describe, is_sharded

if TYPE_CHECKING:
    from torch import Tensor


class WeightMatrix:
    """A parameter, and where the rows and columns of W lie in it.

    Attributes:
        name: for messages.
        layout: where its rows and columns lie.
        d, m: the shape of W.
    """

    def __init__(self, parameter: nn.Parameter, name: str, layout: Layout) -> None:
        self.parameter, self.name, self.layout = parameter, name, layout
        self.d, self.m = layout.d, layout.m

    def of(self, t: Tensor) -> Tensor:
        """What has the parameter's shape as a matrix ``(d, m)``, in at least float32."""
        return self.layout.matrix(at_least_float32(t))

    def back(self, matrix: Tensor) -> Tensor:
        """A matrix ``(d, m)`` in the parameter's shape: the inverse of `of`."""
        return self.layout.weight(matrix)


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
        return _checked(layer, name, Layout(layer.shape))
    if not isinstance(layer, nn.Module):
        raise TypeError(f"expected `layer` to be an nn.Module or an nn.Parameter, got {layer!r}.")
    module: nn.Module = getattr(layer, "_orig_mod", layer)  # torch.compile(module)
    layout_of = use_type(module).layout_of
    weight = own_weight(module)
    if weight is None:
        raise TypeError(
            f"mode='proximal' moves weights, and that of `layer` {name} is computed at every call (a "
            "parametrization, weight_norm, pruning). Leave this layer out, remove the parametrization, or "
            "use mode='hutchinson' with curvature='gauss_newton'."
        )
    assert isinstance(weight, nn.Parameter)
    if isinstance(weight, nn.UninitializedParameter):
        raise TypeError(f"`layer` {name} has no weight yet. Run one batch through the model first.")
    return _checked(weight, name, layout_of(module, weight))


def own_weight(layer: object) -> Tensor | None:
    """The parameter that a layer's weight is now; None if it is computed at every call."""
    module: Any = getattr(layer, "_orig_mod", layer)
    return module if isinstance(module, nn.Parameter) else module._parameters.get("weight")


def _checked(weight: nn.Parameter, name: str, layout: Layout) -> WeightMatrix:
    check_matrix(weight, name)
    if math.prod(weight.shape) == 0:
        raise TypeError(f"expected `layer` to have a weight that is not empty, got {name}. Leave it out.")
    if is_sharded(weight) or getattr(weight, "_fsdp_flattened", False):
        raise TypeError(
            f"mode='proximal' needs the whole weight of `layer` {name} on every process, and this one is "
            "sharded (FSDP, tensor parallelism). Use DDP, or with FSDP2 mode='hutchinson'."
        )
    return WeightMatrix(weight, name, layout)
