"""A checkpoint runs a part of the forward again at every derivative, and what it counts must count once."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch.nn.modules.module import register_module_forward_pre_hook

from fam_optim.graph import nodes

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch


@contextmanager
def counted_once() -> Iterator[None]:
    """Within this context the buffers of modules that run again are as they were, afterwards.

    Such as the running statistics of BatchNorm, which would follow a step's batch more than once. Modules run
    again in a derivative, or where this thread reads what a checkpoint has not kept.
    """
    thread = threading.get_ident()
    before: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def keep(module: Any, args: Any) -> None:
        if nodes.in_derivative() or threading.get_ident() == thread:
            for buffer in module._buffers.values():
                if buffer is not None and id(buffer) not in before:
                    before[id(buffer)] = (buffer, buffer.detach().clone())

    handle = register_module_forward_pre_hook(keep)
    try:
        yield
    finally:
        handle.remove()
        for buffer, value in before.values():
            buffer.data.copy_(value)  # past the count of versions, which says whether a graph is out of date
