"""What the user may name as a layer: modules and parameters, one or several."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn

from fam_optim.layer.kinds import base_type, inputs_first, parameter_use
from fam_optim.layer.record import Observation, parametrization
from fam_optim.layer.use import describe

if TYPE_CHECKING:
    from collections.abc import Sequence

Layer = Observation | nn.Parameter


def weight_layers(model: nn.Module) -> list[nn.Module | nn.Parameter]:
    """The layers of a model that FAM can regularise, in the order in which the model has them.

    >>> hidden = weight_layers(model)[:-1]  # if the model calls its layers in the order in which it has them
    >>> FAM(model.parameters(), torch.optim.SGD, hidden, mode="proximal", lr=0.1)

    Args:
        model: any module; itself too, if it is such a layer.

    Returns:
        Its Linear, convolution and transposed convolution modules, transformers' Conv1D, and subclasses of
        these. The weight itself, an nn.Parameter, where its owner multiplies with it (nn.MultiheadAttention,
        recurrent layers, nn.Bilinear), and where several of the modules share it. Every weight once.
    """
    return list(named_weight_layers(model).values())


def named_weight_layers(model: nn.Module) -> dict[str, nn.Module | nn.Parameter]:
    """The same by their names in the model."""
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
            # A parameter's rows lie along its first axis, so those of a transposed one are not.
            if known is not layer and not (isinstance(known, nn.Module) and inputs_first(known)):
                found[shared_with] = cast("nn.Parameter", weight)
    return found


def _weights_in(module: nn.Module) -> list[tuple[str, nn.Module | nn.Parameter]]:
    """What of `module` is a layer: itself, or weights that it multiplies with."""
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
    """`layer`, with names in `model` ("fc", "blocks.0.attn.in_proj_weight") replaced by what they name."""
    if isinstance(layer, (list, tuple)):
        return [named(model, one) for one in layer]
    if not isinstance(layer, str):
        return layer
    parts: dict[str, Any] = {**dict(model.named_parameters()), **dict(model.named_modules())}
    if layer not in parts:
        known = ", ".join(named_weight_layers(model))
        raise ValueError(f"expected `layer` to name a layer of the model, got {layer!r}. It has {known}.")
    return parts[layer]


def as_layers(layer: Any) -> tuple[Layer, ...]:
    """What the user named as `layer`: modules to be observed, and parameters; TypeError or ValueError for
    anything else, nothing, or the same layer twice."""
    several = layer if isinstance(layer, (list, tuple)) else (layer,)
    if not several:
        raise ValueError("expected `layer` to name at least one layer, got an empty sequence.")
    for one in several:
        if not isinstance(one, (nn.Module, nn.Parameter)):
            by_name = f" Pass model.get_submodule({one!r})." if isinstance(one, str) else ""
            raise TypeError(
                "expected `layer` to be an nn.Module or an nn.Parameter, got the "
                f"{type(one).__name__} {one!r}.{by_name}"
            )
        if isinstance(one, nn.Parameter):
            parameter_use(one)
    layers = tuple(Observation(one) if isinstance(one, nn.Module) else one for one in several)
    if len(distinct(layers)) < len(layers):
        raise ValueError(
            "expected `layer` to name different layers, got the same one twice, or a module and its weight."
        )
    return layers


def distinct(layers: Sequence[Layer]) -> tuple[Layer, ...]:
    """The layers, each once. A weight counts all its uses, so its module is left out if both are named."""
    parameters = {id(one) for one in layers if isinstance(one, Tensor)}
    once: dict[int, Layer] = {}
    for one in layers:
        weights = () if isinstance(one, Tensor) else map(id, weights_of(one))
        if parameters.isdisjoint(weights):
            once.setdefault(id(one.module if isinstance(one, Observation) else one), one)
    return tuple(once.values())


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
