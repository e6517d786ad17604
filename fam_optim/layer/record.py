"""Recording a layer's calls: what kappa needs to know of the forward that made the loss.

Every call leaves a `Use` (the layer's input and weight) on the *graph node* of its output. The
record therefore lives exactly as long as the graph: a forward whose loss is dropped takes its record
along, and nothing piles up. From a loss, the calls that it depends on are found by walking down its
graph (see `tail`); calls of other forwards, of recomputed checkpoints or of another model's loss are
not in it. The module itself carries one stateless hook, so that it can be copied and pickled.
"""

from __future__ import annotations

import threading
import weakref
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge
from torch.nn.utils import parametrize

from fam_optim.compilation import OBSERVED, opaque
from fam_optim.graph import nodes
from fam_optim.interception import unseen
from fam_optim.layer.kinds import base_type, overridden, use_type
from fam_optim.layer.use import describe

if TYPE_CHECKING:
    from collections.abc import Collection

    from torch.autograd.graph import Node

    from fam_optim.layer.use import LayerUse

_KEY = "fam_optim.use"
_watchers: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()
_live: weakref.WeakKeyDictionary[nn.Module, weakref.WeakSet[LayerUse]] = weakref.WeakKeyDictionary()


class _Computed(threading.local):
    """Parametrised weights on their way from the parametrization's hook to the module's, in one thread."""

    def __init__(self) -> None:
        self.weights: weakref.WeakKeyDictionary[nn.Module, Tensor] = weakref.WeakKeyDictionary()


_computed = _Computed()


class Observation:
    """A layer whose calls are being recorded: what `observe` yields and `relative_flatness` takes.

    Args:
        module: the layer, as in `observe`.

    Attributes:
        module: the layer; of a compiled one the module that was compiled.
    """

    def __init__(self, module: nn.Module) -> None:
        module = getattr(module, "_orig_mod", module)  # torch.compile(module) runs the module's own hooks
        use_type(module)
        self.module = module
        self._watching = False

    def start(self) -> None:
        """Records the module's calls from now on."""
        if not self._watching:
            self._watching = True
            _watch(self.module)
            # A forgotten observation must not leave its hook on the user's model.
            self._finalizer = weakref.finalize(self, _unwatch, self.module)

    def stop(self) -> None:
        """Ends the recording; calls recorded so far stay usable as long as their graph lives."""
        if self._watching:
            self._watching = False
            self._finalizer()

    def live_uses(self) -> Collection[LayerUse]:
        """The recorded calls whose graph is still alive."""
        return _live.get(self.module, ())

    def __enter__(self) -> Observation:
        self.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    def __getstate__(self) -> dict[str, Any]:
        return {"module": self.module, "watching": self._watching}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.module = state["module"]
        self._watching = False
        if state["watching"]:
            self.start()

    def __repr__(self) -> str:
        return f"Observation({self.module})"


def observe(module: nn.Module) -> Observation:
    """Records what `relative_flatness` needs of a layer while the forward runs.

    >>> with observe(model.head) as layer:
    ...     loss = criterion(model(x), y)
    >>> kappa = relative_flatness(loss, layer)

    Args:
        module: nn.Linear, nn.Conv1d/2d/3d or nn.ConvTranspose1d/2d/3d.

    Returns:
        A context manager that yields itself. The forward must run inside it; `relative_flatness` may
        be called inside or after.

    Raises:
        TypeError: if the module is not linear in a weight matrix.

    Cost: one look at the layer's output per call. The layer's input is kept as long as the graph.
    """
    return Observation(module)


def recorded_use(node: Node) -> tuple[LayerUse, GradientEdge] | None:
    """The use whose output is computed by `node`, with the edge at which L's derivative in z is taken."""
    record = nodes.metadata(node).get(_KEY)
    return None if record is None else (record[0], GradientEdge(node, record[1]))


def release(use: LayerUse) -> None:
    """Forgets a use after the step on its loss, although the user may keep the loss and so its graph."""
    module = use.module()
    live = None if module is None else _live.get(module)
    if live is not None:
        live.discard(use)
    vars(use).pop("phi", None)  # two optimizers may have used it


def parametrization(module: nn.Module) -> nn.Module | None:
    """What computes a parametrised weight; None for a plain one."""
    # Where nn.Module keeps it: looking in vain for an attribute of a module raises and catches an error.
    if "parametrizations" not in module._modules or not parametrize.is_parametrized(module, "weight"):
        return None
    return cast("nn.ModuleDict", module.parametrizations)["weight"]


def _watch(module: nn.Module) -> None:
    _watchers[module] = _watchers.get(module, 0) + 1
    if not _has_hook(module, _record):
        # First in line: a hook of the user's may change the output, and belongs to the tail then.
        module.register_forward_hook(_record, prepend=True, with_kwargs=True)
    source = parametrization(module)
    if source is not None and not _has_hook(source, _keep_computed):
        source.register_forward_hook(_keep_computed)


def _unwatch(module: nn.Module) -> None:
    _watchers[module] = _watchers.get(module, 1) - 1
    if _watchers[module] <= 0:
        del _watchers[module]
        _remove_hook(module, _record)
        source = parametrization(module)
        if source is not None:
            _remove_hook(source, _keep_computed)


def _has_hook(module: nn.Module, hook: Any) -> bool:
    return any(h is hook for h in module._forward_hooks.values())


def _remove_hook(module: nn.Module, hook: Any) -> None:
    for key in [k for k, h in module._forward_hooks.items() if h is hook]:
        del module._forward_hooks[key]
        module._forward_hooks_with_kwargs.pop(key, None)


def _keep_computed(parametrization: nn.Module, args: Any, weight: Tensor) -> None:
    """Keeps a parametrised weight as the forward got it: computing it again may advance its state
    (spectral_norm iterates at every access)."""
    if torch.is_grad_enabled():
        _keep(parametrization, weight)


@partial(opaque, reason=OBSERVED)
def _keep(parametrization: nn.Module, weight: Tensor) -> None:
    _computed.weights[parametrization] = weight


def _weight_in_use(module: nn.Module) -> Tensor:
    source = parametrization(module)
    if source is not None and not _has_hook(source, _keep_computed):
        raise RuntimeError(
            f"`layer` {describe(module)} was parametrised after it was observed. Register parametrizations "
            "(weight_norm, spectral_norm, LoRA) before building FAM or entering observe()."
        )
    computed = None if source is None else _computed.weights.pop(source, None)
    return module.weight if computed is None else computed  # type: ignore[return-value]


def _record(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor | None:
    """Forward hook: leaves a `Use` on the node that computes `output`."""
    # The only thing that torch.compile sees of it: evaluation is compiled in one piece.
    return _leave_use(module, args, kwargs, output) if torch.is_grad_enabled() else None


@partial(opaque, reason=OBSERVED)
def _leave_use(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor | None:
    observed: Tensor | None = unseen(_observed, module, args, kwargs, output)
    return observed


def _observed(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor | None:
    if torch.is_inference_mode_enabled():
        return None
    if "_is_replica" in vars(module):
        raise RuntimeError(
            f"nn.DataParallel calls copies of `layer` {describe(module)} on other devices, which are not "
            "observed. Use torch.nn.parallel.DistributedDataParallel."
        )
    # A copy carries the hook along (an average of the model, say), but nobody asked for its kappa. And
    # within torch.func.grad, vmap, jvp, ... there is no graph that a loss outside could be walked down.
    if module not in _watchers or torch._C._are_functorch_transforms_active():
        return None
    phi = args[0] if args else kwargs["input"]
    replaced = None
    if not output.requires_grad:
        # Nothing up to here is trained (a frozen body and layer), but kappa depends on what comes
        # behind, so the graph must begin here. A clone, since a leaf bars in-place activations.
        output = replaced = output.detach().requires_grad_().clone()
    # The edge, not the tensor: ReLU(inplace=True) behind the layer turns the tensor into its own
    # output (pytorch/pytorch#61519). And the edge of the base where z is a view of all of it (Linear
    # on sequences): an in-place operation on a view rewires the view's node, never the base's.
    base = output._base if output._is_view() else None
    source = output if base is None or base.numel() != output.numel() else base
    node = source.grad_fn
    if node is None or _KEY in nodes.metadata(node):
        return replaced
    use = use_type(module)(module, phi, _weight_in_use(module), output.shape)
    if overridden(module) is not None:
        _check_output(module, use, output)
    nodes.metadata(node)[_KEY] = (use, source.output_nr)
    _live.setdefault(module, weakref.WeakSet()).add(use)
    return replaced


def _check_output(module: nn.Module, use: LayerUse, output: Tensor) -> None:
    """Raises TypeError unless a class that overrides torch's forward computes the same: by the same
    operations on the same tensors, to the same numbers, here and now. (Fake quantisation does not.)"""
    again = use.again(cast("Tensor | None", module.bias))
    same = output.shape == again.shape and torch.equal(output.detach(), again.detach())
    if not (same and nodes.computed_alike(output, again)):
        base, name = base_type(module), overridden(module)
        assert base is not None
        raise TypeError(
            f"`layer` {describe(module)}, a {type(module).__module__}.{type(module).__qualname__}, overrides "
            f"{base.__name__}.{name} and computes something else than {base.__name__} does with this weight "
            "and input, so its output need not be linear in its weight (quantisation-aware layers are not). "
            f"Pass a plain nn.{base.__name__}, or the weight, an nn.Parameter, with mode='hutchinson'."
        )
