"""Whose flatness counts: a network's layers by their module names, or "all", "hidden" and so on of them."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from fam_optim.layers import named_weight_layers

GROUPS = {  # of what FAM can regularise
    "all": slice(None),
    "hidden": slice(-1),
    "last": slice(-1, None),
    "last but one": slice(-2, -1),
    "first": slice(1),
}


def select(model: nn.Module, names: Sequence[str]) -> list[Any]:
    """The layers of these names, each once.

    Raises:
        ValueError: for a name that none has; it lists those that there are.
    """
    by_name = named_weight_layers(model)
    chosen: dict[str, Any] = {}
    for name in names:
        if name not in by_name and name not in GROUPS:
            raise ValueError(
                f"expected --layer to name layers of this network, got {name!r}: it takes "
                f"{', '.join([*by_name, *GROUPS])}"
            )
        own = [name] if name in by_name else [*by_name][GROUPS[name]]
        chosen |= {each: by_name[each] for each in own}
    if not chosen:
        raise ValueError(
            f"--layer {' '.join(names)} names no layer: the network has {', '.join(by_name)} alone"
        )
    return [*chosen.values()]
