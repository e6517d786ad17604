"""Keeps kappa's computation free of side effects: torch.compile does not trace it, nobody waits for the
device, and modules that a checkpoint runs again keep their state."""

import copy
import inspect
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.modules.module import register_module_forward_pre_hook

from fam_optim.graph import nodes

_Function = TypeVar("_Function", bound="Callable[..., Any]")
_KNOWS_REASON = "reason" in inspect.signature(torch.compiler.disable).parameters  # since torch 2.8


def opaque(function: _Function, reason: str) -> _Function:
    """Returns `function` so that torch.compile does not trace it: a compiled graph breaks at its call, and
    its arguments have a graph. With fullgraph=True the break is an error, which quotes the reason."""
    disable: Any = torch.compiler.disable  # untyped
    untraced: _Function = disable(function, **({"reason": reason} if _KNOWS_REASON else {}))
    return untraced


def in_full_precision(device: torch.device) -> AbstractContextManager[None]:
    """Returns a context without autocast, which would round the products and squares in kappa."""
    available = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if available else nullcontext()


def reading_waits(tensor: Tensor) -> bool:
    """Returns whether reading the tensor's numbers means waiting for an accelerator."""
    return tensor.device.type != "cpu"


class AsyncFlag:
    """A boolean scalar that is copied from an accelerator to the host without waiting."""

    def __init__(self, flag: Tensor) -> None:
        self._host, self._arrived = flag, None
        if flag.device.type != "cpu":
            self._host = torch.empty((), dtype=torch.bool, pin_memory=True).copy_(flag, non_blocking=True)
            self._arrived = torch.get_device_module(flag.device).Event()
            self._arrived.record()

    def read(self) -> bool | None:
        """Returns the value, or None if it has not arrived yet."""
        if self._arrived is not None and not self._arrived.query():
            return None
        return bool(self._host.tolist())  # reads host memory; torch dispatches no operation


@contextmanager
def counted_once() -> Iterator[None]:
    """A context that restores modules that run again in it, in a derivative or when this thread reads what a
    checkpoint has not kept. Otherwise BatchNorm's statistics, say, would count a batch more than once."""
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


_OF_EVERY_MODULE = frozenset(vars(torch.nn.Module()))


def _restoring(module: Any) -> Callable[[], None]:
    """Returns a function that restores buffers and attributes: tensors, numbers and what holds others."""
    attributes = {k: v for k, v in vars(module).items() if isinstance(v, (int, float, Tensor))}
    own = (v for k, v in vars(module).items() if k not in _OF_EVERY_MODULE or k == "_buffers")
    holders = [(v, copy.copy(v)) for v in own if isinstance(v, (list, dict, set, deque))]
    tensors = (t for t in (*module._buffers.values(), *attributes.values()) if isinstance(t, Tensor))
    values = [(t, t.detach().clone()) for t in tensors]

    def restore() -> None:
        vars(module).update(attributes)
        for holder, held in holders:
            holder.clear()
            (holder.update if isinstance(holder, (dict, set)) else holder.extend)(held)
        for tensor, value in values:
            tensor.data.copy_(value)  # .data does not advance the version counter, so graphs stay valid

    return restore
