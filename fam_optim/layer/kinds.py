"""The kinds of layers that are linear in a weight matrix, and why others are refused."""

from __future__ import annotations

import sys
from typing import Any, cast

import torch
from torch import Tensor, nn

from fam_optim.graph import calls, flags
from fam_optim.layer.convolution import CONVOLUTIONS, TRANSPOSED, ConvTransposeUse, ConvUse
from fam_optim.layer.use import (
    Conv1DUse,
    LayerUse,
    LinearUse,
    Use,
    complex_weight,
    describe,
    is_sharded,
    tensor_parallel,
)


def use_type(module: nn.Module) -> type[LayerUse]:
    """The kind of `Use` that describes `module`'s forward.

    Raises:
        TypeError: if the module is not known to be linear in a weight matrix of its own.
    """
    if "_distribute_module_applied" in getattr(module, "__dict__", ()):  # parallelize_module's mark
        raise TypeError(tensor_parallel(module))
    base = base_type(module)
    if base is not None:
        return _kinds()[base]
    if isinstance(getattr(module, "base_layer", None), nn.Module):
        raise TypeError(
            f"expected `layer` to have a weight matrix, got the wrapper {describe(module)}, which adds an "
            "adapter's output to that of its base_layer. Pass layer.base_layer to regularise the flatness in "
            "the base weight alone, or write the adapter as a parametrization of nn.Linear "
            "(torch.nn.utils.parametrize)."
        )
    raise TypeError(
        "expected `layer` to be nn.Linear, nn.Conv1d/2d/3d, nn.ConvTranspose1d/2d/3d, transformers' Conv1D "
        f"or an nn.Parameter with at least two dimensions, got {describe(module)}, which is not known to be "
        "linear in a weight matrix. Pass its weight, an nn.Parameter, instead (as a penalty with "
        "mode='hutchinson')."
    )


_KINDS: dict[type[nn.Module], type[LayerUse]] = {
    nn.Linear: LinearUse,
    **dict.fromkeys(CONVOLUTIONS, ConvUse),
    **dict.fromkeys(TRANSPOSED, ConvTransposeUse),
}


def _kinds() -> dict[type[nn.Module], type[LayerUse]]:
    # Hugging Face's own Linear (GPT-2 has no other), without importing what the user has not.
    conv1d = getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None)
    return _KINDS if conv1d is None else {**_KINDS, conv1d: Conv1DUse}


def base_type(module: nn.Module) -> type[nn.Module] | None:
    """The class that `module` is of, or is derived from, among those with a weight matrix."""
    return next((base for base in _kinds() if isinstance(module, base)), None)


def overridden(module: nn.Module) -> str | None:
    """Which method of the module's class something else computes its output in place of, if any."""
    base: Any = base_type(module)
    for name in ("forward", "_conv_forward"):
        own = getattr(module, name, None)
        if own is None:
            continue
        replaced = name in vars(module) or own.__module__ != base.__module__
        if replaced or getattr(type(module), name) is not getattr(base, name, None):
            return f"{base.__name__}.{name}"
    return None


def objection(module: nn.Module, use: LayerUse, output: Tensor, seen: bool) -> str | None:
    """Why kappa cannot be computed of a call, whose output is not what the module's class computes.

    That is by the same operations on the same tensors, to the same numbers, here and now. (Fake quantisation
    is not.)

    Args:
        seen: whether numbers were compared before: reading them waits for an accelerator, and is done once.
    """
    try:
        computed = use.forward(cast("Tensor | None", module.bias))
    except RuntimeError:  # not even of fitting shapes
        computed = None
    if computed is not None and output.shape == computed.shape:
        graph = computed.requires_grad and output.requires_grad
        alike = not graph or calls.computed_alike(output, computed)
        equal = seen and flags.reading_waits(computed)
        equal = equal or torch.allclose(output.detach(), computed.detach(), rtol=0, atol=0, equal_nan=True)
        if alike and equal:
            return None
    base: Any = base_type(module)
    method = overridden(module)
    how = f"class or instance overrides {method}" if method else "output a hook changes before FAM sees it"
    return (
        f"`layer` {describe(module)}, a {type(module).__module__}.{type(module).__qualname__}, whose {how}, "
        f"computes something else than {base.__name__} does with this weight and input, so its output need "
        "not be linear in its weight (that of quantisation-aware layers is not). Pass a plain "
        f"{base.__name__}, or the weight, an nn.Parameter, with mode='hutchinson'."
    )


def check_matrix(weight: Tensor, name: str) -> None:
    """Raises TypeError for a parameter that is no real matrix."""
    if weight.dim() < 2:
        raise TypeError(
            "expected `layer` to have a weight matrix (at least two dimensions), got a parameter of shape "
            f"{tuple(weight.shape)}. Pass the layer's weight, not its bias or a normalisation's scale."
        )
    if weight.is_complex():
        raise TypeError(complex_weight(name, weight))


def parameter_use(parameter: Tensor) -> Use:
    """The bare parameter as a weight matrix: rows along its first axis.

    Raises:
        TypeError: if it has fewer than two dimensions, is complex, or sharded.
    """
    check_matrix(parameter, describe(parameter))
    if is_sharded(parameter):
        raise TypeError(
            f"expected `layer` to be a whole weight, got a sharded one, a {describe(parameter)}. With FSDP2 "
            "(fully_shard) pass the module that owns it, in any mode. Tensor parallelism is not supported."
        )
    return Use(parameter)
