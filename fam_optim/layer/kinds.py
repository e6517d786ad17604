"""Which modules and parameters have a weight matrix W ``(d, m)``, and why others are refused."""

import sys
from collections.abc import Iterable, Sequence
from types import NoneType
from typing import Any, cast

import torch
from torch import Tensor, nn

from fam_optim import unnoticed
from fam_optim.graph.reach import computed_alike
from fam_optim.layer.convolution import CONVOLUTIONS, TRANSPOSED, ConvTransposeUse, ConvUse
from fam_optim.layer.use import (
    COMPLEX,
    TENSOR_PARALLEL,
    Conv1DUse,
    LayerUse,
    Layout,
    LinearUse,
    Use,
    at_least_float32,
    describe,
    is_sharded,
)


def use_type(module: nn.Module) -> type[LayerUse]:
    """Returns the kind of `Use` of a module's forward; TypeError if that is not known to be linear in W."""
    if "_distribute_module_applied" in getattr(module, "__dict__", ()):  # parallelize_module's mark
        raise TypeError(TENSOR_PARALLEL.format(describe(module)))
    for base, use in _kinds().items():
        if isinstance(module, base):
            return use
    if isinstance(getattr(module, "base_layer", None), nn.Module):
        raise TypeError(
            f"expected `layer` to have a weight matrix, got the wrapper {describe(module)} of a base_layer "
            "and an adapter. Pass layer.base_layer to regularise the base weight alone, or write the adapter "
            "as a parametrization of nn.Linear (torch.nn.utils.parametrize)."
        )
    raise TypeError(
        "expected `layer` to be nn.Linear, nn.Conv1d/2d/3d, nn.ConvTranspose1d/2d/3d, transformers' Conv1D "
        f"or an nn.Parameter with at least two dimensions, got {describe(module)}, which is not known to be "
        "linear in a weight matrix. Pass its weight, an nn.Parameter (with mode='hutchinson')."
    )


def _kinds() -> dict[Any, type[LayerUse]]:
    # With Hugging Face's own Linear (GPT-2 has no other), but transformers is not imported for it.
    conv1d = getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", NoneType)
    kinds: dict[Any, type[LayerUse]] = {nn.Linear: LinearUse, conv1d: Conv1DUse}
    return kinds | dict.fromkeys(CONVOLUTIONS, ConvUse) | dict.fromkeys(TRANSPOSED, ConvTransposeUse)


def base_type(module: nn.Module) -> type[nn.Module] | None:
    """Returns the class with a weight matrix that `module` is an instance of; None if there is none."""
    return next((base for base in _kinds() if isinstance(module, base)), None)


def overridden(module: nn.Module) -> str | None:
    """Returns which method of its base the module's class or instance overrides; None if neither does."""
    base: Any = base_type(module)
    for name in ("forward", "_conv_forward"):
        own, of_base = getattr(module, name, None), getattr(base, name, None)
        patched = of_base is not None and of_base.__module__ != base.__module__
        if patched or getattr(own, "__func__", own) is not of_base:
            return f"{base.__name__}.{name}"
    return None


def objection(module: nn.Module, use: LayerUse, output: Tensor, seen: bool) -> str | None:
    """Returns why kappa cannot be computed of a call; None if its output is what the module's class computes,
    by the same operations, to the same numbers. If they were `seen` before, no accelerator is waited for."""
    try:
        computed = use.operation(use.phi, use.weight, cast("Tensor | None", module.bias))
    except RuntimeError:  # the shapes do not even fit
        computed = None
    if computed is not None and output.shape == computed.shape:
        graph = computed.requires_grad and output.requires_grad
        alike = not graph or computed_alike(output, computed)
        equal = seen and unnoticed.reading_waits(computed)
        equal = equal or torch.allclose(output.detach(), computed.detach(), rtol=0, atol=0, equal_nan=True)
        if alike and equal:
            return None
    base: Any = base_type(module)
    method = overridden(module)
    how = f"class or instance overrides {method}" if method else "output a hook changes before FAM sees it"
    return (
        f"`layer` {describe(module)}, a {type(module).__module__}.{type(module).__qualname__}, whose {how}, "
        f"computes something else than {base.__name__} does, and need not be linear in its weight (as in "
        f"quantisation-aware layers). Pass a plain {base.__name__}, or the weight, an nn.Parameter, with "
        "mode='hutchinson'."
    )


def parameter_use(parameter: Tensor) -> Use:
    """Returns the bare parameter as a weight matrix, rows along its first axis; TypeError if it is none."""
    if parameter.dim() < 2:
        raise TypeError(
            "expected `layer` to have a weight matrix (at least two dimensions), got a parameter of shape "
            f"{tuple(parameter.shape)}. Pass the layer's weight, not its bias or a normalisation's scale."
        )
    if parameter.is_complex():
        raise TypeError(COMPLEX.format(describe(parameter), parameter.dtype))
    if is_sharded(parameter):
        raise TypeError(
            f"expected `layer` to be a whole weight, got a sharded one, a {describe(parameter)}. With FSDP2 "
            "(fully_shard) pass the module that owns it, in any mode. Tensor parallelism is not supported."
        )
    return Use(parameter)


class WeightMatrix:
    """A parameter that the proximal step moves, as the matrix W ``(d, m)`` of its layer."""

    def __init__(self, parameter: nn.Parameter, name: str, layout: Layout) -> None:
        self.parameter, self.name, self.layout = parameter, name, layout
        self.d, self.m = layout.d, layout.m

    def of(self, t: Tensor) -> Tensor:
        """Returns a tensor in the parameter's shape as a matrix ``(d, m)``, in at least float32."""
        return self.layout.matrix(at_least_float32(t))

    def back(self, matrix: Tensor) -> Tensor:
        """Returns a matrix ``(d, m)`` in the parameter's shape: the inverse of `of`."""
        return self.layout.weight(matrix)


def weight_matrix(layer: object) -> WeightMatrix:
    """Returns a layer's weight as a matrix. The rows of a bare parameter lie along its first axis. Raises
    TypeError if there is none, if it is computed at every call, or not whole on this process."""
    name = describe(layer)
    if not isinstance(layer, (nn.Module, nn.Parameter)):
        raise TypeError(f"expected `layer` to be an nn.Module or an nn.Parameter, got {layer!r}.")
    module: Any = getattr(layer, "_orig_mod", layer)  # torch.compile(module)
    kind = None if isinstance(layer, nn.Parameter) else use_type(module)
    weight = own_weight(module)
    if weight is None:
        raise TypeError(
            f"mode='proximal' moves weights, and that of `layer` {name} is computed at every call (a "
            "parametrization, weight_norm, pruning). Leave this layer out, remove the parametrization, or "
            "use mode='hutchinson' with curvature='gauss_newton'."
        )
    if isinstance(weight, nn.UninitializedParameter):
        raise TypeError(f"`layer` {name} has no weight yet. Run one batch through the model first.")
    if weight.numel() == 0:
        raise TypeError(f"expected `layer` to have a weight that is not empty, got {name}. Leave it out.")
    if is_sharded(weight) or getattr(weight, "_fsdp_flattened", False):
        raise TypeError(
            f"mode='proximal' needs the whole weight of `layer` {name} on every process, and this one is "
            "sharded (FSDP, tensor parallelism). Use DDP, or with FSDP2 mode='hutchinson'."
        )
    layout = parameter_use(weight).layout  # refuses a weight that is no real matrix
    return WeightMatrix(weight, name, layout if kind is None else kind.layout_of(module, weight))


def own_weight(layer: object) -> nn.Parameter | None:
    """Returns the parameter that a layer's weight is now; None if the weight is computed at every call."""
    module: Any = getattr(layer, "_orig_mod", layer)
    return module if isinstance(module, nn.Parameter) else module._parameters.get("weight")


def check_unchanged(layers: Iterable[Any], weights: Sequence[WeightMatrix]) -> None:
    """Raises TypeError or RuntimeError if a layer's weight is not among `weights`, or has a new shape."""
    held = {id(w.parameter): w.layout.shape for w in weights}
    for layer in (*layers, *(w.parameter for w in weights)):
        weight = own_weight(layer)
        if weight is None:
            weight_matrix(layer)  # raises the TypeError that says why
        elif held.get(id(weight)) != weight.shape:
            raise RuntimeError(
                f"the weight of `layer` {describe(layer)} was replaced or resized after FAM was built (by "
                "load_state_dict(assign=True), to_empty(), tying), and FAM has the old one. Build FAM anew."
            )
