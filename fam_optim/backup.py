"""Weights and optimizer state as they were before a step that may fail halfway."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import LBFGS

if TYPE_CHECKING:
    from torch.optim import Optimizer


class Backup:
    """What `optimizer` has before a step in which its weights move between evaluations of the closure.

    Cost: a copy of weights and state; of LBFGS's history, which it only appends to and drops from, none.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.weights = [p.detach().clone() for p in self.parameters]
        base = getattr(optimizer, "base_optimizer", optimizer)
        copied = _copied_but_for_lists if isinstance(base, LBFGS) else copy.deepcopy
        self.state = {p: copied(state) for p, state in optimizer.state.items()}

    def restore(self) -> None:
        """Puts all of it back."""
        with torch.no_grad():
            for parameter, weight in zip(self.parameters, self.weights, strict=True):
                parameter.copy_(weight)
        self.optimizer.state.clear()
        self.optimizer.state.update(self.state)


def _copied_but_for_lists(state: dict[str, Any]) -> dict[str, Any]:
    return {name: _copied(value) for name, value in state.items()}


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    return list(value) if isinstance(value, list) else value
