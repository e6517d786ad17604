"""Chooses the layers that are kept flat: by module names, or "all", "hidden" and so on."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from fam_optim.layers import named_weight_layers

GROUPS = {  # parts of the list of layers that FAM can regularise
    "all": slice(None),
    "hidden": slice(-1),
    "last": slice(-1, None),
    "last but one": slice(-2, -1),
    "first": slice(1),
}


def select(model: nn.Module, names: Sequence[str]) -> list[Any]:
    """Returns the layers of these names or groups, each once."""
    by_name = named_weight_layers(model)
    groups = {name: [*by_name][part] for name, part in GROUPS.items()}
    chosen: dict[str, None] = {}
    for name in names:
        if name not in by_name and name not in groups:
            known = ", ".join([*by_name, *groups])
            raise ValueError(
                f"expected --layer to name layers of this network, got {name!r}: it takes {known}"
            )
        chosen |= dict.fromkeys([name] if name in by_name else groups[name])
    if not chosen:
        known = ", ".join(by_name)
        raise ValueError(f"--layer {' '.join(names)} names no layer: the network has {known} alone")
    return [by_name[name] for name in chosen]
