"""Records a layer's calls: what kappa needs to know of the forward that made the loss.

Every call leaves a `Use` (the layer's input and weight) on the *graph node* of its output, where it lives as
long as the graph. A walk down the graph of a loss finds the calls that the loss depends on (`trace`). There
is no register of modules: only a module's hook and its observers keep anything of it.
"""

import threading
import weakref
from collections import deque
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node
from torch.nn.utils import parametrize

from fam_optim.graph import nodes
from fam_optim.layer import hooks
from fam_optim.layer.kinds import objection, overridden, use_type
from fam_optim.layer.use import LayerUse, describe
from fam_optim.unnoticed import opaque

_KEY = "fam_optim.use"
_OBSERVED = (
    "fam_optim observes the calls of this layer, which breaks the graph. For fullgraph=True compile what "
    "comes before the layer, model.body.compile(fullgraph=True); otherwise nothing need be changed"
)
_exporting = getattr(torch.compiler, "is_exporting", lambda: False)  # since torch 2.7


class Observation:
    """A layer whose calls are being recorded: what `observe` yields and `relative_flatness` takes.

    Args:
        module: the layer, as in `observe`.
    """

    _recorder: Any = None  # the last recorder of the module's calls
    _finalizer: Any = None  # ends the recording; None while nothing is recorded

    def __init__(self, module: nn.Module) -> None:
        if not isinstance(module, nn.Module):
            raise TypeError(
                f"expected `module` to be an nn.Module, got {describe(module)}. A weight is not observed: "
                "pass the nn.Parameter itself to relative_flatness."
            )
        self.module = getattr(module, "_orig_mod", module)  # torch.compile runs the module's own hooks
        use_type(self.module)

    def start(self) -> "Observation":
        """Starts to record the module's calls, and returns itself."""
        if self._finalizer is None:
            self._recorder = hooks.owner(self.module) or _Recorder(self.module)
            self._recorder.observers.add(self)
            # A forgotten observation must not leave its hook on the user's model.
            self._finalizer = weakref.finalize(self, self._recorder.leave)
        return self

    def stop(self, *exc_info: object) -> None:
        """Ends the recording. Calls recorded so far stay usable as long as their graph lives."""
        if self._finalizer is not None:
            self._recorder.observers.discard(self)
            self._finalizer()
            self._finalizer = None

    __enter__, __exit__ = start, stop

    def called_within(self, checkpoint: Node) -> bool:
        """Returns whether the module was called inside a reentrant checkpoint, where there is no graph."""
        made = nodes.sequence_number(checkpoint) + 1
        return self._recorder is not None and made in self._recorder.without_graph

    def __getstate__(self) -> dict[str, Any]:
        return {"module": self.module}  # a copy records nothing until it is started

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
    """Returns the use whose output z `node` computes, and the edge of z; None if it is none, or released."""
    use, output = nodes.metadata(node).get(_KEY, (None, 0))
    return (use, GradientEdge(node, output)) if hasattr(use, "phi") else None


def parametrization(module: Any) -> nn.Module | None:
    """Returns the module that computes a parametrised weight; None if the weight is plain."""
    return module.parametrizations["weight"] if parametrize.is_parametrized(module, "weight") else None


class _Recorder:
    """A module's hooks and what they know. All observations of the module share one recorder."""

    def __init__(self, module: nn.Module) -> None:
        self.module = weakref.ref(module)
        self.observers: weakref.WeakSet[Observation] = weakref.WeakSet()
        # How many graph nodes the thread had made at each of the last calls without a graph.
        self.without_graph: deque[int] = deque(maxlen=256)
        self._numbers_seen = False
        self._computed = threading.local()  # a parametrised weight, on its way from one hook to the other
        hooks.attach(module, self.record)
        source = parametrization(module)
        if source is not None:
            hooks.attach(source, self.keep)

    def leave(self) -> None:
        """Removes the hooks if nobody observes the module any more."""
        module = self.module()
        if module is not None and not list(self.observers) and hooks.owner(module) is self:
            for part in (module, parametrization(module)):
                if part is not None:
                    hooks.detach(part)

    @hooks.unscripted
    def keep(self, source: nn.Module, args: Any, kwargs: Any, weight: Any = None) -> None:
        """Forward hook of a parametrization: keeps the weight that the forward got, since computing it again
        may advance the parametrization's state (spectral_norm iterates at every access)."""
        if torch.is_grad_enabled() and not _exporting():
            self._keep(weight)

    @partial(opaque, reason=_OBSERVED)
    def _keep(self, weight: Tensor) -> None:
        self._computed.weight = weight

    @hooks.unscripted
    def record(self, module: nn.Module, args: Any, kwargs: Any, output: Any = None) -> Any:
        """Forward hook of the module: leaves a `Use` on the node that computes `output`."""
        # torch.compile sees no more of the hook than this test, so it compiles evaluation in one piece.
        if torch.is_grad_enabled() and not _exporting():
            return self._leave_use(module, args, kwargs, output)
        if not torch.compiler.is_compiling() and nodes.made_so_far() not in self.without_graph:
            self.without_graph.append(nodes.made_so_far())
        return None

    @partial(opaque, reason=_OBSERVED)
    def _leave_use(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Tensor | None:
        if "_is_replica" in vars(module):
            raise RuntimeError(
                f"nn.DataParallel calls copies of `layer` {describe(module)} on other devices, which are not "
                "observed. Use torch.nn.parallel.DistributedDataParallel."
            )
        # Calls within torch.func.grad, vmap, jvp, ... leave no graph that leads to them from a loss outside.
        # Export and tracing leave none either. A shallow copy has the module's hooks, but is not observed.
        transformed = torch._C._are_functorch_transforms_active() or torch.is_inference_mode_enabled()
        exported = torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined,no-untyped-call]
        if module is not self.module() or transformed or exported or not isinstance(output, Tensor):
            return None
        weight = self._weight_in_use(module)
        replaced = None
        if not output.requires_grad:
            # Nothing up to here is trained (a frozen body and layer), but kappa depends on what comes behind,
            # so the graph must begin here. It begins with a clone, as a leaf bars in-place activations.
            output = replaced = output.detach().requires_grad_().clone()
        # The shape of a nested tensor cannot be asked for; such a call is refused later.
        shape = torch.Size() if output.is_nested else output.shape
        phi = args[0] if args else kwargs["x" if "x" in kwargs else "input"]
        use = use_type(module)(module, phi, weight, shape)
        if use.objection is None and (overridden(module) is not None or not hooks.is_first(module)):
            use.objection = objection(module, use, output, self._numbers_seen)
            self._numbers_seen = True
        # Keeps the edge, not the tensor: ReLU(inplace=True) behind the layer turns the tensor into ReLU's own
        # output (pytorch/pytorch#61519). Where z is a view of all of its base (Linear on sequences), keeps
        # the base's edge: an in-place operation on a view rewires the view's node, never the base's.
        base = output._base if output._is_view() and not output.is_nested else None
        source = output if base is None or base.numel() != output.numel() else base
        node = source.grad_fn
        if node is not None and _KEY not in nodes.metadata(node):
            nodes.metadata(node)[_KEY] = (use, source.output_nr)
            use.holders.update(self.observers)
        return replaced

    def _weight_in_use(self, module: nn.Module) -> Tensor:
        source = parametrization(module)
        if source is not None and hooks.owner(source) is not self:
            raise RuntimeError(
                f"`layer` {describe(module)} was parametrised after it was observed. Register "
                "parametrizations before building FAM or entering observe()."
            )
        computed = vars(self._computed).pop("weight", None)
        return cast("Tensor", module.weight if computed is None else computed)
