"""Functions that torch.compile must leave uncompiled."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, TypeVar

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

_Function = TypeVar("_Function", bound="Callable[..., Any]")
_KNOWS_REASON = "reason" in inspect.signature(torch.compiler.disable).parameters  # since torch 2.8

OBSERVED = (
    "fam_optim observes the calls of this layer, which breaks the graph. For fullgraph=True compile what "
    "comes before the layer, model.body.compile(fullgraph=True); otherwise nothing need be changed"
)


def opaque(function: _Function, reason: str) -> _Function:
    """`function`, which torch.compile does not trace: a compiled graph breaks at its call.

    What it got and returns are then tensors with a graph, whatever is compiled around it. With
    fullgraph=True that is an error, which quotes the reason.
    """
    disable: Any = torch.compiler.disable  # untyped
    untraced: _Function = disable(function, **({"reason": reason} if _KNOWS_REASON else {}))
    return untraced
