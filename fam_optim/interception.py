"""Seeing a backward inside a closure.

Loops written for LBFGS, SAM or Lightning call backward in the closure themselves. While the closure runs,
`torch.autograd.backward`, which every ``Tensor.backward`` calls, lets this thread's interception change the
loss. (A TorchFunctionMode would see ``Tensor.backward`` alone, and costs a microsecond for every operation.)
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable


class _Active(threading.local):
    """The interceptions that this thread is in, the innermost last."""

    def __init__(self) -> None:
        self.stack: list[BackwardInterception] = []


_active = _Active()
_lock = threading.Lock()
_entered = 0
_torchs_own: Any = None


class BackwardInterception:
    """Within this context a backward of this thread's backpropagates ``transform(loss)``.

    Attributes:
        seen: whether backward was called at all.
    """

    def __init__(self, transform: Callable[[Tensor], Tensor]) -> None:
        self.transform = transform
        self.seen = False

    def __enter__(self) -> BackwardInterception:
        global _entered, _torchs_own
        with _lock:
            if not _entered:
                _torchs_own, torch.autograd.backward = torch.autograd.backward, _backward
            _entered += 1
        _active.stack.append(self)
        return self

    def __exit__(self, *exc_info: object) -> None:
        global _entered
        _active.stack.pop()
        with _lock:
            _entered -= 1
            if not _entered:
                torch.autograd.backward = _torchs_own


def _backward(tensors: Any, grad_tensors: Any = None, *args: Any, **kwargs: Any) -> Any:
    """Stands in for `torch.autograd.backward`: the innermost interception's turn, then the next one's."""
    if not _active.stack:  # all have had theirs, or it is another thread's backward
        return _torchs_own(tensors, grad_tensors, *args, **kwargs)
    interception = _active.stack.pop()
    try:
        interception.seen = True
        return _backward(interception.transform(_one_loss(tensors, grad_tensors)), None, *args, **kwargs)
    finally:
        _active.stack.append(interception)


def _one_loss(tensors: Any, gradients: Any) -> Tensor:
    """The scalar whose backward is that of several tensors, each from the gradient that it was given."""
    tensors = (tensors,) if isinstance(tensors, Tensor) else tuple(tensors)
    gradients = (gradients,) if gradients is None or isinstance(gradients, Tensor) else tuple(gradients)
    gradients += (None,) * (len(tensors) - len(gradients))
    first, *others = (t if g is None else (t * g).sum() for t, g in zip(tensors, gradients, strict=True))
    total: Tensor = sum(others, first)
    return total
