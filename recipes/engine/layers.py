"""Whose flatness counts: a network's layers by their module names, or "all", "hidden" and "last" of them."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from fam_optim import weight_layers

GROUPS = {"all": slice(None), "hidden": slice(-1), "last": slice(-1, None)}  # of what FAM can regularise


def select(model: nn.Module, names: Sequence[str]) -> list[Any]:
    """The layers of these names, each once.

    Raises:
        ValueError: for a name that none has; it lists those that there are.
    """
    every = weight_layers(model)
    by_name = {name: module for name, module in model.named_modules() if module in every}
    chosen: list[Any] = []
    for name in names:
        if name in GROUPS:
            chosen += every[GROUPS[name]]
        elif name in by_name:
            chosen.append(by_name[name])
        else:
            raise ValueError(
                f"expected --layer to name layers of this network, got {name!r}: it takes "
                f"{', '.join([*by_name, *GROUPS])}"
            )
    if not chosen:
        raise ValueError(
            f"--layer {' '.join(names)} names no layer: the network has {', '.join(by_name)} alone"
        )
    return list(dict.fromkeys(chosen))
