"""A forward hook of one module alone: copies, pickles, scripts and quantised versions have none."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor  # noqa: TC002  # torch.jit.script looks for it
from torch.nn.modules import module as every_module

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

_DICTS = ("_forward_hooks", "_forward_hooks_with_kwargs")


class _Token:
    """Stands for a hook in the dict that the handles of hooks know which were registered before ours."""


class _Uncopied(OrderedDict[int, Any]):
    """The hooks of one module, of which copies and pickles get all but the one by the key `private`."""

    private = -1

    def __init__(self, module: nn.Module, before: OrderedDict[int, Any]) -> None:
        super().__init__()
        self.module = weakref.ref(module)
        if isinstance(before, _Uncopied):  # of the module that this one is a shallow copy of
            self.update(before.copy())
            return
        self._before, self._removals, myself = before, [], weakref.ref(self)
        for key in before:
            self[key], before[key] = before[key], _Token()
            self._removals.append(weakref.ref(before[key], partial(_remove, myself, key)))

    def copy(self) -> Any:
        return OrderedDict(item for item in self.items() if item[0] != self.private)

    def __reduce__(self) -> Any:
        return OrderedDict, (), None, None, iter(self.copy().items())


def _remove(hooks: weakref.ref[_Uncopied], key: int, token: object) -> None:
    """A handle has removed the token: the hook goes too."""
    alive = hooks()
    if alive is not None:
        alive.pop(key, None)


def attach(module: nn.Module, hook: Callable[..., Any]) -> None:
    """Calls ``hook(module, args, kwargs, output)`` after every forward of `module`, before any other hook."""
    for name in _DICTS:
        hooks = getattr(module, name)
        if not isinstance(hooks, _Uncopied) or hooks.module() is not module:
            setattr(module, name, _Uncopied(module, hooks))
    handle = module.register_forward_hook(hook, prepend=True, with_kwargs=True)
    for name in _DICTS:
        getattr(module, name).private = handle.id


def detach(module: nn.Module) -> None:
    """Takes the hook away again."""
    for name in _DICTS:
        hooks = getattr(module, name)
        if isinstance(hooks, _Uncopied):
            hooks.pop(hooks.private, None)


def attached(module: nn.Module) -> Any:
    """The hook, if `module` has one."""
    hooks: Any = module._forward_hooks
    return hooks.get(hooks.private) if isinstance(hooks, _Uncopied) and hooks.module() is module else None


def is_first(module: nn.Module) -> bool:
    """Whether the hook sees the output as the module's forward returned it."""
    hooks: Any = module._forward_hooks
    return not every_module._global_forward_hooks and next(iter(hooks)) == hooks.private


def unscripted(hook: Callable[..., Any]) -> Callable[..., Any]:
    """`hook`, which torch.jit.script compiles as one that does nothing.

    It looks for the source of what a function wraps, and knows no hooks with keywords.
    """
    hook.__wrapped__ = _nothing  # type: ignore[attr-defined]
    return hook


def _nothing(self: Any, input: tuple[Tensor], output: Tensor) -> None:
    return None
