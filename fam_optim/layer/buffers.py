"""Modules' buffers, kept as they are while kappa is computed.

A derivative through a checkpoint runs its part of the forward again, and with it what advances at every call:
BatchNorm's averages, spectral_norm's iteration. Training does so once, however many derivatives kappa takes.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.modules.module import register_module_forward_pre_hook

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor, nn


@contextmanager
def buffers_kept() -> Iterator[None]:
    """Gives all buffers of modules that are called within this context the numbers back that they had before."""
    before: dict[int, tuple[Tensor, Tensor]] = {}

    def keep(module: nn.Module, args: Any) -> None:
        for buffer in module.buffers(recurse=False):
            if id(buffer) not in before:
                before[id(buffer)] = buffer, buffer.detach().clone()

    handle = register_module_forward_pre_hook(keep)
    try:
        yield
    finally:
        handle.remove()
        for buffer, numbers in before.values():
            with torch.no_grad():
                buffer.data.copy_(numbers)  # past the count of versions: nobody's graph is out of date
