"""An optimizer that wraps a base optimizer and shares the base's state with it, without a copy."""

import copy
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch.optim import LBFGS, Optimizer

from fam_optim.regularizer import Regularizer

_KEY = "fam"  # of the regulariser's state in a state dict
# The code of torch's wrapper around each class's `step`, which runs step hooks and labels the profile.
_TORCHS_WRAPPER = Optimizer.profile_hook_step(lambda self: None).__code__


def _shared(name: str) -> Any:
    """Returns a property that reads and sets the base optimizer's attribute of this name."""
    return property(
        lambda self: getattr(self.base_optimizer, name),
        lambda self, value: setattr(self.base_optimizer, name, value),
        doc=f"The base optimizer's `{name}`.",
    )


class OptimizerWrapper(Optimizer):
    """Delegates state, parameter groups, defaults and step hooks to `base_optimizer`, and little else. A
    state dict has the state of `regularizer` too. Delegating everything would leak the base's flags: a
    GradScaler that finds `_step_supports_amp_scaling` on a fused base leaves the unscaling to a step that it
    does not call (pytorch/pytorch#88015)."""

    base_optimizer: Optimizer
    regularizer: Regularizer

    if not TYPE_CHECKING:  # a type checker that saw this would accept misspelt names

        def __getattr__(self, name: str) -> Any:
            """Returns `train` and `eval` of a schedule-free base, which frameworks look for by name."""
            if name in ("train", "eval") and "base_optimizer" in vars(self):
                return getattr(self.base_optimizer, name)
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        """Refuses to set unknown names, since settings are chosen when the optimizer is built."""
        declared = any(name in vars(of).get("__annotations__", ()) for of in type(self).__mro__)
        if not (name.startswith("_") or declared or hasattr(type(self), name) or name in vars(self)):
            raise AttributeError(
                f"{type(self).__name__} has no attribute {name!r} that can be set. `lam` and the parameter "
                f"groups may change while training; other settings are arguments of a new optimizer."
            )
        super().__setattr__(name, value)

    def _start(self, base_optimizer: Optimizer, regularizer: Regularizer) -> None:
        """Puts a new, copied or unpickled wrapper together. `Optimizer.__init__` would make another state."""
        self.base_optimizer, self.regularizer = base_optimizer, regularizer
        for kind in ("state_dict_pre", "state_dict_post", "load_state_dict_pre", "load_state_dict_post"):
            setattr(self, f"_optimizer_{kind}_hooks", OrderedDict())
        for kind in ("step_pre", "step_post"):  # which a base that wraps another may lack
            vars(base_optimizer).setdefault(f"_optimizer_{kind}_hooks", OrderedDict())
        self._patch_step_function()
        regularizer.start(base_optimizer)

    def __getstate__(self) -> dict[str, Any]:
        return {"regularizer": self.regularizer, "base_optimizer": self.base_optimizer}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._start(**state)

    state = _shared("state")
    param_groups = _shared("param_groups")
    defaults = _shared("defaults")
    _optimizer_step_pre_hooks = _shared("_optimizer_step_pre_hooks")
    _optimizer_step_post_hooks = _shared("_optimizer_step_post_hooks")

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Zeroes the gradients, as the base optimizer does."""
        self.base_optimizer.zero_grad(*(() if set_to_none else (False,)))  # some take no argument

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group of parameters to the base optimizer."""
        self.base_optimizer.add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """Returns the base's state dict with the regulariser's state; the plain base can load it too."""
        for hook in self._optimizer_state_dict_pre_hooks.values():
            hook(self)
        state_dict: dict[str, Any] = {**self.base_optimizer.state_dict(), _KEY: self.regularizer.state()}
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            changed = post_hook(self, state_dict)
            state_dict = state_dict if changed is None else changed
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a `state_dict` of this optimizer or of its plain base."""
        state_dict = dict(state_dict)
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            changed = hook(self, state_dict)
            state_dict = state_dict if changed is None else changed
        own = state_dict.pop(_KEY, None)
        self.base_optimizer.load_state_dict(state_dict)
        # The plain base's checkpoint has none, and lam of a penalty is not that of a proximal step.
        if own is not None and ("means" in own) == hasattr(self.regularizer, "means"):
            self.regularizer.load(own)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _base_step(self, *args: Any) -> Any:
        """Calls the base's step without its step hooks, which already run around this optimizer's step."""
        # A scheduler that was built on the base has replaced its step to note that it was called. That is
        # noted here instead. A step that anything else has replaced or decorated is called as it is.
        base = self.base_optimizer
        step = vars(base).get("step")
        if step is None or hasattr(step, "_wrapped_by_lr_sched"):
            base._opt_called = True  # type: ignore[attr-defined]
            own: Any = type(base).step
            is_wrapped = getattr(own, "__code__", None) is _TORCHS_WRAPPER
            step = (own.__wrapped__ if is_wrapped else own).__get__(base)
        hooks = base._optimizer_step_pre_hooks, base._optimizer_step_post_hooks
        base._optimizer_step_pre_hooks, base._optimizer_step_post_hooks = OrderedDict(), OrderedDict()
        try:
            return step(*args)
        finally:
            base._optimizer_step_pre_hooks, base._optimizer_step_post_hooks = hooks

    def _is_torchs_own(self) -> bool:
        """Returns whether the base is a class of torch's, which moves no weight before the closure runs."""
        return type(self.base_optimizer).__module__.startswith("torch.optim.")


@contextmanager
def undone_if_it_fails(optimizer: OptimizerWrapper) -> Iterator[None]:
    """A context that restores weights and state if the step in it raises; it costs a copy of both."""
    weights = [(p, p.detach().clone()) for p in optimizer.regularizer.trained]
    uncopied: dict[int, Any] = {}
    if isinstance(optimizer.base_optimizer, LBFGS):  # it only appends tensors to its history and drops them
        values = [value for of_one in optimizer.state.values() for value in of_one.values()]
        uncopied = {id(t): t for value in values if isinstance(value, list) for t in value}
    state = {p: copy.deepcopy(of_one, dict(uncopied)) for p, of_one in optimizer.state.items()}
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for parameter, weight in weights:
                parameter.copy_(weight)
        optimizer.state.clear()
        optimizer.state.update(state)
        raise
