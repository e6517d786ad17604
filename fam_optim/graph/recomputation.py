"""A checkpoint runs a part of the forward again at every derivative, and what it counts must count once."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.nn.modules.module import register_module_forward_pre_hook

from fam_optim.graph import nodes

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def counted_once() -> Iterator[None]:
    """Puts back, afterwards, the buffers, tensors and numbers of modules that run again in this context.

    Such as the running statistics of BatchNorm, which would follow a step's batch more than once. Modules run
    again in a derivative, or where this thread reads what a checkpoint has not kept.
    """
    thread = threading.get_ident()
    before: dict[int, _State] = {}

    def keep(module: Any, args: Any) -> None:
        if (nodes.in_derivative() or threading.get_ident() == thread) and id(module) not in before:
            before[id(module)] = _State(module)

    handle = register_module_forward_pre_hook(keep)
    try:
        yield
    finally:
        handle.remove()
        for state in before.values():
            state.restore()


class _State:
    """What a module counts: its buffers, and those of its attributes that are tensors or numbers."""

    def __init__(self, module: Any) -> None:
        self.module = module
        self.buffers = dict(module._buffers)
        self.attributes = {k: v for k, v in vars(module).items() if isinstance(v, (int, float, Tensor))}
        tensors = (*self.buffers.values(), *self.attributes.values())
        self.values = [(t, t.detach().clone()) for t in tensors if isinstance(t, Tensor)]

    def restore(self) -> None:
        """Each is the object that it was, with the numbers that it had."""
        self.module._buffers.update(self.buffers)
        vars(self.module).update(self.attributes)
        for tensor, value in self.values:
            tensor.data.copy_(value)  # past the count of versions, which says whether a graph is out of date
