"""A checkpoint runs a part of the forward again at every derivative, and what it counts must count once."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.nn.modules.module import register_module_forward_pre_hook

from fam_optim.graph import nodes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@contextmanager
def counted_once() -> Iterator[None]:
    """Puts back, afterwards, the buffers, tensors and numbers of modules that run again in this context.

    Such as the running statistics of BatchNorm, which would follow a step's batch more than once. Modules run
    again in a derivative, or where this thread reads what a checkpoint has not kept.
    """
    thread = threading.get_ident()
    before: dict[int, Callable[[], None]] = {}

    def keep(module: Any, args: Any) -> None:
        if (nodes.in_derivative() or threading.get_ident() == thread) and id(module) not in before:
            before[id(module)] = _restoring(module)

    handle = register_module_forward_pre_hook(keep)
    try:
        yield
    finally:
        handle.remove()
        for restore in before.values():
            restore()


def _restoring(module: Any) -> Callable[[], None]:
    """What makes each buffer, and each attribute that is a tensor or a number, what it is now."""
    buffers = dict(module._buffers)
    attributes = {k: v for k, v in vars(module).items() if isinstance(v, (int, float, Tensor))}
    tensors = (t for t in (*buffers.values(), *attributes.values()) if isinstance(t, Tensor))
    values = [(t, t.detach().clone()) for t in tensors]

    def restore() -> None:
        module._buffers.update(buffers)
        vars(module).update(attributes)
        for tensor, value in values:
            tensor.data.copy_(value)  # past the count of versions, which says whether a graph is out of date

    return restore
