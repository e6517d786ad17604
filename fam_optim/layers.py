"""A user may name one layer or several, each a module or a parameter."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from fam_optim.layer.kinds import base_type, parameter_use, use_type
from fam_optim.layer.record import Observation, parametrization

Layer = Observation | nn.Parameter


def weight_layers(model: nn.Module) -> list[nn.Module | nn.Parameter]:
    """Returns the layers of a model that FAM can regularise, in the order in which the model has them.

    >>> hidden = weight_layers(model)[:-1]  # if the model calls its layers in the order in which it has them
    >>> FAM(model.parameters(), torch.optim.SGD, hidden, mode="proximal", lr=0.1)

    Args:
        model: any module, even one that is itself such a layer.

    Returns:
        Its modules of the types Linear, convolution, transposed convolution and transformers' Conv1D, and of
        their subclasses. The weight itself, an nn.Parameter, where its owner uses it as a matrix
        (nn.MultiheadAttention, recurrent layers, nn.Bilinear) or several modules share it. No weight twice.
    """
    return list(named_weight_layers(model).values())


def named_weight_layers(model: nn.Module) -> dict[str, nn.Module | nn.Parameter]:
    """Returns the layers that FAM can regularise, like `weight_layers`, by their names in the model."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected `model` to be an nn.Module, got a {type(model).__name__}.")
    found: dict[str, nn.Module | nn.Parameter] = {}
    first: dict[int, str] = {}
    inside: set[int] = set()
    for name, module in model.named_modules():
        for suffix, layer in _weights_in(module) if id(module) not in inside else ():
            inside.update(id(part) for part in module.modules() if part is not module)
            path = f"{name}.{suffix}".strip(".")
            weight = layer._parameters.get("weight") if isinstance(layer, nn.Module) else layer
            shared_with = path if weight is None else first.setdefault(id(weight), path)
            known = found.setdefault(shared_with, layer)
            # A bare parameter must have its rows along the first axis, which a transposed weight has not.
            if known is not layer and not (isinstance(known, nn.Module) and use_type(known).inputs_first):
                found[shared_with] = cast("nn.Parameter", weight)
    return found


def _weights_in(module: nn.Module) -> list[tuple[str, nn.Module | nn.Parameter]]:
    """Returns what counts as a layer in `module`: the module itself, or weights that it multiplies with."""
    if base_type(module) is not None:
        return [("", module)]
    if not isinstance(module, (nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase, nn.Bilinear)):
        return []
    own = module._parameters.items()
    weights: list[Any] = [(n, p) for n, p in own if p is not None and p.dim() > 1 and "weight" in n]
    if isinstance(module, nn.MultiheadAttention):
        weights.append(("out_proj.weight", module.out_proj.weight))
    return weights


def named(model: nn.Module, layer: Any) -> Any:
    """Returns `layer` with names ("fc", "blocks.0.attn.in_proj_weight") replaced by parts of `model`."""
    if isinstance(layer, (list, tuple)):
        return [named(model, one) for one in layer]
    if not isinstance(layer, str):
        return layer
    parts: dict[str, Any] = {**dict(model.named_parameters()), **dict(model.named_modules())}
    if layer not in parts:
        known = ", ".join(named_weight_layers(model))
        raise ValueError(f"expected `layer` to name a layer of the model, got {layer!r}. It has {known}.")
    return parts[layer]


def several(layer: Any) -> tuple[Any, ...]:
    """Returns one layer or a list or tuple of layers as a tuple; ValueError if that is empty."""
    layers = tuple(layer) if isinstance(layer, (list, tuple)) else (layer,)
    if not layers:
        raise ValueError(
            "expected `layer` to name at least one layer, got an empty sequence (of a model with one "
            "weight layer weight_layers(model)[:-1] is empty). Name the layer."
        )
    return layers


def as_layers(layer: Any) -> tuple[Layer, ...]:
    """Returns what the user named as `layer`, modules in observations; refuses what is none, or twice."""
    given = several(layer)
    for one in given:
        if not isinstance(one, (nn.Module, nn.Parameter)):
            got = f"the {type(one).__name__} {one!r}"
            got += f". Pass model.get_submodule({one!r})" if isinstance(one, str) else ""
            raise TypeError(f"expected `layer` to be an nn.Module or an nn.Parameter, got {got}.")
        if isinstance(one, nn.Parameter):
            parameter_use(one)
    layers = tuple(Observation(one) if isinstance(one, nn.Module) else one for one in given)
    if len(distinct(layers)) < len(layers):
        raise ValueError(
            "expected `layer` to name different layers, got the same one twice, or a module and its weight."
        )
    return layers


def distinct(layers: Sequence[Layer]) -> tuple[Layer, ...]:
    """Returns each layer once. A module is left out if its weight is named too, which counts all its uses."""
    parameters = {id(one) for one in layers if isinstance(one, Tensor)}
    once: dict[int, Layer] = {}
    for one in layers:
        weights = () if isinstance(one, Tensor) else map(id, weights_of(one))
        if parameters.isdisjoint(weights):
            once.setdefault(id(one.module if isinstance(one, Observation) else one), one)
    return tuple(once.values())


def device_of(layers: Sequence[Layer]) -> torch.device:
    """Returns the device of the layers' first weight."""
    return next((w.device for layer in layers for w in weights_of(layer)), torch.device("cpu"))


def weights_of(layer: Layer) -> list[Tensor]:
    """Returns the parameters of a layer's weight: the weight itself, or those that it is computed from."""
    if isinstance(layer, Tensor):
        return [layer]
    source = parametrization(layer.module)
    if source is not None:
        return list(source.parameters())
    own = layer.module._parameters
    if own.get("weight") is not None:
        return [cast("Tensor", own["weight"])]
    # Pruning and the older weight_norm and spectral_norm compute `weight` from weight_* in a pre-hook.
    return [p for name, p in own.items() if p is not None and name.startswith("weight_")]
