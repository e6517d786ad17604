"""What the user may name as a layer: modules and parameters, one or several."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn

from fam_optim.layer.kinds import base_type, parameter_use
from fam_optim.layer.record import Observation, parametrization
from fam_optim.layer.use import describe

if TYPE_CHECKING:
    from fam_optim.flatness import Layer


def weight_layers(model: nn.Module) -> list[nn.Module]:
    """The modules of a model that FAM can regularise, each once, in the order in which the model has them.

    So "all" is ``weight_layers(model)``, "all but the last" ``weight_layers(model)[:-1]``, "the last two"
    ``weight_layers(model)[-2:]``, if the model names its layers in the order in which it calls them. Left
    out is what no forward calls as a module: the projections inside nn.MultiheadAttention.

    >>> hidden = weight_layers(model)[:-1]
    >>> FAM(model.parameters(), torch.optim.SGD, hidden, mode="hutchinson", curvature="gauss_newton", lr=0.1)

    Args:
        model: any module; itself too, if it is such a layer.

    Returns:
        Its Linear, convolution and transposed convolution modules, and subclasses of these.
    """
    inside = {m for a in model.modules() if isinstance(a, nn.MultiheadAttention) for m in a.modules()}
    return [m for m in model.modules() if base_type(m) is not None and m not in inside]


def as_layers(layer: Any) -> tuple[Layer, ...]:
    """What the user named as `layer`: modules to be observed, and parameters.

    Raises:
        TypeError, ValueError: for anything else, nothing, or the same layer twice.
    """
    several = layer if isinstance(layer, (list, tuple)) else (layer,)
    if not several:
        raise ValueError("expected `layer` to name at least one layer, got an empty sequence.")
    for one in several:
        if not isinstance(one, (nn.Module, nn.Parameter)):
            raise TypeError(
                f"expected `layer` to be an nn.Module or an nn.Parameter, got {type(one).__name__}: {one!r}."
            )
        if isinstance(one, nn.Parameter):
            parameter_use(one)
    if len({id(one) for one in several}) < len(several):
        raise ValueError("expected `layer` to name different layers, got the same one twice.")
    return tuple(Observation(one) if isinstance(one, nn.Module) else one for one in several)


def weights_of(layer: Layer) -> list[Tensor]:
    """The parameters behind a layer's weight: the weight itself, or what it is parametrised by."""
    if isinstance(layer, Tensor):
        return [layer]
    source = parametrization(layer.module)
    if source is not None:
        return list(source.parameters())
    own = layer.module._parameters
    if own.get("weight") is not None:
        return [cast("Tensor", own["weight"])]
    # Pruning and the older weight_norm and spectral_norm compute `weight` in a pre-hook, from weight_*.
    return [p for name, p in own.items() if p is not None and name.startswith("weight_")]


def name_of(layer: Layer) -> str:
    """The layer as the user knows it, for messages."""
    return describe(layer.module if isinstance(layer, Observation) else layer)
