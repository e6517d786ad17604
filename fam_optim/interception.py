"""Seeing ``loss.backward()`` inside a closure.

Loops written for LBFGS, SAM or Lightning call backward in the closure themselves. While the closure
runs, a `TorchFunctionMode` sees each ``Tensor.backward`` and lets it run on another loss.
https://docs.pytorch.org/docs/stable/notes/extending.html#extending-all-torch-api-with-modes
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.overrides import TorchFunctionMode, _get_current_function_mode, _pop_mode_temporarily

if TYPE_CHECKING:
    from collections.abc import Callable


class BackwardInterception(TorchFunctionMode):
    """Within this context ``loss.backward(...)`` backpropagates ``transform(loss)``.

    Attributes:
        seen: whether backward was called at all.
    """

    def __init__(self, transform: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.transform = transform
        self.seen = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not Tensor.backward:
            return func(*args, **kwargs)
        self.seen = True
        loss, *rest = args
        gradient = rest.pop(0) if rest else kwargs.pop("gradient", None)
        if gradient is not None:  # backward from <gradient, loss>, which is a scalar again
            loss = (loss * gradient).sum()
        return func(self.transform(loss), None, *rest, **kwargs)  # type: ignore[no-untyped-call]


def unseen(function: Callable[..., Any], *args: Any) -> Any:
    """``function(*args)``, which is known to call no backward: no interception looks at what it does.

    A mode sees every operation and every attribute of a tensor that is asked for, a microsecond each.
    """
    top = _get_current_function_mode()  # type: ignore[no-untyped-call]
    if not isinstance(top, BackwardInterception):
        return function(*args)
    with _pop_mode_temporarily():
        return function(*args)
