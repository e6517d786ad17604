"""Gives one module a forward hook that its copies, pickles, scripts and quantised versions do not have."""

import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as every_module

_DICTS = ("_forward_hooks", "_forward_hooks_with_kwargs")
_OURS = -1  # the key of our hook; torch counts from 0


class _Uncopied(OrderedDict[int, Any]):
    """The hooks of one module. Copies and pickles of it leave out ours."""

    def __init__(self, module: nn.Module, before: OrderedDict[int, Any]) -> None:
        super().__init__()
        self.module = weakref.ref(module)
        if isinstance(before, _Uncopied):  # the module is a shallow copy of one with our hook
            before = before.copy()
        self._before = before  # the dict that the handles of earlier hooks know, each with a token in it now
        for key in before:
            self[key], before[key] = before[key], set()
            weakref.finalize(before[key], _remove, weakref.ref(self), key)

    def copy(self) -> Any:
        """Returns the hooks without ours, in a plain dict."""
        return OrderedDict(item for item in self.items() if item[0] != _OURS)

    def __reduce__(self) -> Any:
        return OrderedDict, (), None, None, iter(self.copy().items())


def _remove(hooks: weakref.ref[_Uncopied], key: int) -> None:
    """Removes a hook after its handle has removed the token."""
    alive = hooks()
    if alive is not None:
        alive.pop(key, None)


def attach(module: nn.Module, hook: Callable[..., Any]) -> None:
    """Calls ``hook(module, args, kwargs, output)`` after every forward of `module`, before any other hook."""
    for name, ours in zip(_DICTS, (hook, True), strict=True):
        hooks = getattr(module, name)
        if not isinstance(hooks, _Uncopied) or hooks.module() is not module:
            hooks = _Uncopied(module, hooks)
            setattr(module, name, hooks)
        hooks[_OURS] = ours
        hooks.move_to_end(_OURS, last=False)


def detach(module: nn.Module) -> None:
    """Removes the hook that `attach` has added to `module`, if there is one."""
    for name in _DICTS:
        hooks = getattr(module, name)
        if isinstance(hooks, _Uncopied):
            hooks.pop(_OURS, None)


def owner(module: nn.Module) -> Any:
    """Returns the object whose method `attach` has added to `module` as a hook; None if there is none."""
    hooks: Any = module._forward_hooks
    ours = isinstance(hooks, _Uncopied) and hooks.module() is module
    return getattr(hooks.get(_OURS), "__self__", None) if ours else None


def is_first(module: nn.Module) -> bool:
    """Returns whether the hook sees the output as the module's forward returned it."""
    hooks: Any = module._forward_hooks
    return not every_module._global_forward_hooks and next(iter(hooks)) == _OURS


def unscripted(hook: Callable[..., Any]) -> Callable[..., Any]:
    """Returns `hook`; torch.jit.script, which cannot compile keyword hooks, takes `_nothing` in its place."""
    hook.__wrapped__ = _nothing  # type: ignore[attr-defined]
    return hook


def _nothing(self: Any, input: tuple[Tensor], output: Tensor) -> None:
    return None
