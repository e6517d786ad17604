"""Seeing ``loss.backward()`` inside a closure.

Loops written for LBFGS, SAM or Lightning call backward in the closure themselves. While the closure
runs, a `TorchFunctionMode` sees each ``Tensor.backward`` and lets it run on another loss.
https://docs.pytorch.org/docs/stable/notes/extending.html#extending-all-torch-api-with-modes
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

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
