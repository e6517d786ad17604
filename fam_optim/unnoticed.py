"""What keeps kappa's computation unnoticed: torch.compile does not trace it, nobody waits for the device, and
modules that a checkpoint runs again count once."""

from __future__ import annotations

import inspect
import threading
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor
from torch.nn.modules.module import register_module_forward_pre_hook

from fam_optim.graph import nodes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

_Function = TypeVar("_Function", bound="Callable[..., Any]")
_KNOWS_REASON = "reason" in inspect.signature(torch.compiler.disable).parameters  # since torch 2.8


def opaque(function: _Function, reason: str) -> _Function:
    """`function`, which torch.compile does not trace: a compiled graph breaks at its call.

    What it got and returns are then tensors with a graph, whatever is compiled around it. With
    fullgraph=True that is an error, which quotes the reason.
    """
    disable: Any = torch.compiler.disable  # untyped
    untraced: _Function = disable(function, **({"reason": reason} if _KNOWS_REASON else {}))
    return untraced


def in_full_precision(device: torch.device) -> AbstractContextManager[None]:
    """A context in which no autocast rounds the products and squares that kappa is made of."""
    kind = device.type
    cast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.autocast(kind, enabled=False) if cast else nullcontext()


def reading_waits(tensor: Tensor) -> bool:
    """Whether to read the tensor's numbers is to wait until an accelerator has computed them."""
    return tensor.device.type != "cpu"


class AsyncFlag:
    """A boolean scalar, on its way from an accelerator to the host."""

    def __init__(self, flag: Tensor) -> None:
        self._arrived: Any = None
        if flag.device.type == "cpu":
            self._host = flag
            return
        self._host = torch.empty((), dtype=torch.bool, pin_memory=True)
        self._host.copy_(flag, non_blocking=True)
        self._arrived = torch.get_device_module(flag.device).Event()
        self._arrived.record()

    def read(self) -> bool | None:
        """Its value; None if it has not arrived yet."""
        if self._arrived is not None and not self._arrived.query():
            return None
        return bool(self._host.tolist())  # of memory of the host: nothing is dispatched


@contextmanager
def counted_once() -> Iterator[None]:
    """Puts back, afterwards, the buffers, tensors and numbers of modules that run again in this context.

    Such as the running statistics of BatchNorm, which would follow a step's batch more than once. Modules run
    again in a derivative, or where this thread reads what a checkpoint has not kept.
    """
    thread = threading.get_ident()
    before: dict[int, Callable[[], None]] = {}

    def keep(module: Any, args: Any) -> None:
        if (nodes.derivative() != -1 or threading.get_ident() == thread) and id(module) not in before:
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
