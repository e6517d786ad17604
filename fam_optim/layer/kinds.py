"""The kinds of layers that are linear in a weight matrix, and why others are refused."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from fam_optim.layer.use import (
    CONVOLUTIONS,
    TRANSPOSED,
    ConvTransposeUse,
    ConvUse,
    LinearUse,
    Use,
    describe,
    is_sharded,
    tensor_parallel,
)

if TYPE_CHECKING:
    from torch import Tensor

    from fam_optim.layer.use import LayerUse


def use_type(module: nn.Module) -> type[LayerUse]:
    """The kind of `Use` that describes `module`'s forward.

    Raises:
        TypeError: if the module is not known to be linear in a weight matrix of its own.
    """
    if "_distribute_module_applied" in getattr(module, "__dict__", ()):  # parallelize_module's mark
        raise TypeError(tensor_parallel(module))
    base = base_type(module)
    if base is not None:
        return _KINDS[base]
    if isinstance(getattr(module, "base_layer", None), nn.Module):
        raise TypeError(
            f"expected `layer` to have a weight matrix, got the wrapper {describe(module)}, which adds an "
            "adapter's output to that of its base_layer and never forms the sum of their weights. Pass "
            "layer.base_layer to regularise the flatness in the base weight alone, or write the adapter as a "
            "parametrization of nn.Linear (torch.nn.utils.parametrize), whose sum is the weight then."
        )
    raise TypeError(
        "expected `layer` to be nn.Linear, nn.Conv1d/2d/3d, nn.ConvTranspose1d/2d/3d or an nn.Parameter with "
        f"at least two dimensions, got {describe(module)}, which is not known to be linear in a weight "
        "matrix. Pass its weight, an nn.Parameter, with mode='hutchinson' instead."
    )


_KINDS: dict[type[nn.Module], type[LayerUse]] = {
    nn.Linear: LinearUse,
    **dict.fromkeys(CONVOLUTIONS, ConvUse),
    **dict.fromkeys(TRANSPOSED, ConvTransposeUse),
}


def base_type(module: nn.Module) -> type[nn.Module] | None:
    """torch's class that `module` is of, or is derived from, among those with a weight matrix."""
    return next((base for base in _KINDS if isinstance(module, base)), None)


def overridden(module: nn.Module) -> str | None:
    """Which method of its base's a subclass computes its output with instead, if it does."""
    base = base_type(module)
    for name in ("forward", "_conv_forward"):
        if getattr(type(module), name, None) is not getattr(base, name, None):
            return name
    return None


def parameter_use(parameter: Tensor) -> Use:
    """The bare parameter as a weight matrix: rows along its first axis.

    Raises:
        TypeError: if it has fewer than two dimensions.
    """
    if parameter.dim() < 2:
        raise TypeError(
            "expected `layer` to have a weight matrix (at least two dimensions), got a parameter of shape "
            f"{tuple(parameter.shape)}. Pass the layer's weight, not its bias or a normalisation's scale."
        )
    if is_sharded(parameter):
        raise TypeError(
            f"expected `layer` to be a whole weight, got a sharded one, a {describe(parameter)}. With FSDP2 "
            "(fully_shard) pass the module that owns it, in any mode. Tensor parallelism is not supported."
        )
    return Use(parameter)
