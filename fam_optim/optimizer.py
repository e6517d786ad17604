"""FAM, the optimizer: minimises ``loss + lam * kappa`` and hands the step to a base optimizer.

Source: Adilova et al., FAM: Relative Flatness Aware Minimization, 2023 (arXiv 2307.02337), equation 3.
"""

from __future__ import annotations

import copy
import math
import warnings
import weakref
from collections import OrderedDict
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge
from torch.optim import LBFGS, Optimizer

from fam_optim.compilation import opaque
from fam_optim.flatness import Settings, check_mode, tails_flatness
from fam_optim.interception import BackwardInterception
from fam_optim.layer import LayerUse, describe, parameter_use
from fam_optim.observation import Observation, metadata, parametrization, release
from fam_optim.tail import LayerNotUsedError, find_tail

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch.autograd.graph import Node

    from fam_optim.flatness import Layer

_CHECKPOINT_KEY = "fam"
_MARK = "fam_optim.regularized"


class _Mark(NamedTuple):
    """On the node of a regularised loss: the loss without penalties, and the FAMs that added theirs."""

    plain: Tensor
    by: frozenset[int]


class _Shared:
    """What a user's calls write to. It is one object, as Lightning and Fabric wrap optimizers in a class
    that inherits from theirs: `regularize` and the setters are then called with the wrapper for self, which
    reads FAM's attributes but writes its own (Lightning-AI/pytorch-lightning, core/optimizer.py)."""

    lam: float
    last_kappa: Tensor | None = None
    may_step = False  # whether regularize() was called since the last step


class FAM(Optimizer):
    """Minimises ``loss + lam * kappa``, kappa the relative flatness of one layer's weights.

    >>> optimizer = FAM(model.parameters(), torch.optim.SGD, layer=model.head, lr=0.1, momentum=0.9)
    >>> optimizer.zero_grad()
    >>> loss = optimizer.step(lambda: criterion(model(x), y))

    A step

    1.  runs the closure once, under gradient mode;
    2.  computes kappa of its loss at the layer, from the graph that the forward left;
    3.  backpropagates ``loss + lam * kappa`` in one ordinary backward;
    4.  lets the base optimizer step on these gradients;
    5.  returns what the closure returned: the plain loss.

    The closure may leave backward to FAM (it returns the loss) or call ``loss.backward()`` itself, as
    closures for LBFGS or Lightning do; that backward then runs on ``loss + lam * kappa``. Zeroing the
    gradients stays the caller's business, as with any optimizer. Loops that want no closure call
    ``optimizer.regularize(loss).backward()`` and ``optimizer.step()``.

    Args:
        params: parameters or parameter groups, for the base optimizer.
        base_optimizer: a class or callable ``(params, **base_kwargs) -> torch.optim.Optimizer``.
        layer: what is kept flat: an nn.Linear, nn.Conv1d/2d/3d or nn.ConvTranspose1d/2d/3d, usually the
            last or last but one; an nn.Parameter (modes full and hutchinson); or a sequence of these,
            whose kappas are added. On a last layer with a convex loss kappa is never negative; on
            layers below it can be, as the loss need not be convex in their weights.
        lam: weight of kappa, at least 0; may be changed at any time. At 0 the step is the base's, bit
            for bit.
        mode: "exact", "full" (forms the Hessian; tiny layers) or "hutchinson" (random probes).
        measure: "neuronwise" (paper, section 1) or "layerwise" (section 3.2).
        normalize: divide kappa by m, as the authors' code does; the paper's lambdas apply then.
        detach_hessian: keep only the part of the gradient that goes through ``<w_s, w_u>``, (I) of the
            paper's Lemma 1, ``2 T W``.
        n_samples: probes per step (hutchinson).
        generator: of the probes; its state is part of `state_dict` (hutchinson).
        **base_kwargs: for the base optimizer: lr, momentum, ...

    Attributes:
        base_optimizer: owns ``state``, ``param_groups`` and ``defaults``; FAM's are the same objects.
        last_kappa: kappa of the loss as it last entered the penalty, detached, on the device; None before.

    Raises:
        TypeError: if the layer has no weight matrix, or the base is not an optimizer.
        ValueError: for a negative or non-finite lam, an unknown mode or measure, exact with a parameter.

    Warns:
        UserWarning: if the layer's weight is not among `params`: it is measured but not trained.

    Cost: that of `relative_flatness`, in tail backwards: about one for a softmax cross-entropy head.
    """

    def __init__(
        self,
        params: Any,
        base_optimizer: Callable[..., Optimizer],
        layer: nn.Module | nn.Parameter | Sequence[nn.Module | nn.Parameter],
        lam: float = 3e-3,
        mode: str = "exact",
        *,
        measure: str = "neuronwise",
        normalize: bool = False,
        detach_hessian: bool = False,
        n_samples: int = 1,
        generator: torch.Generator | None = None,
        **base_kwargs: Any,
    ) -> None:
        self.settings = Settings(measure, mode, normalize, n_samples, generator, detach_hessian)
        self._shared = _Shared()
        self.lam = lam
        layers = _as_layers(layer)
        for one in layers:
            check_mode(one.module if isinstance(one, Observation) else one, mode)
        self.base_optimizer = _build_base(base_optimizer, params, base_kwargs)
        self.layers = layers
        self._start()
        self._warn_untrained()

    def _start(self) -> None:
        """What a new, copied or unpickled FAM needs beside its attributes."""
        for kind in ("state_dict_pre", "state_dict_post", "load_state_dict_pre", "load_state_dict_post"):
            setattr(self, f"_optimizer_{kind}_hooks", OrderedDict())
        self._patch_step_function()
        self._shared.may_step = False
        self._unchecked = False
        self._touched: set[int] = set()
        self._missed: LayerNotUsedError | None = None
        self._factors: dict[Node, Tensor] = {}
        self._used: weakref.WeakSet[LayerUse] = weakref.WeakSet()
        self._reevaluates = isinstance(self.base_optimizer, LBFGS)
        for layer in self.layers:
            if isinstance(layer, Observation):
                layer.start()

    # The penalty

    @property
    def lam(self) -> float:
        """Weight of kappa."""
        return self._shared.lam

    @lam.setter
    def lam(self, value: float) -> None:
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"expected `lam` to be finite and at least 0, got {value!r}.")
        self._shared.lam = float(value)

    @property
    def last_kappa(self) -> Tensor | None:
        """kappa as it last entered the penalty, detached."""
        return self._shared.last_kappa

    def regularize(self, loss: Tensor) -> Tensor:
        """``loss + lam * kappa``, differentiable: for loops that call backward themselves.

        >>> scaler.scale(optimizer.regularize(loss)).backward()
        >>> scaler.step(optimizer)

        With gradient accumulation call it on every micro-batch's loss: kappa is linear in the loss. What
        it returned is not regularised again, neither by a second call nor by a closure's backward.

        Args:
            loss: the scalar loss of a forward since FAM was built, before its backward.

        Raises:
            RuntimeError: if the loss does not depend on the layer, and as `relative_flatness`.
        """
        regularized = self._regularize(loss, range(len(self.layers))) if self.lam else loss
        self._shared.may_step = True
        return regularized

    def _regularize(self, loss: Tensor, which: Sequence[int]) -> Tensor:
        plain, by = self._without_penalties(loss)
        if id(self._shared) in by:
            self._touched.update(which)
            return loss
        tails = [find_tail(plain, self.layers[i]) for i in which]
        self._touched.update(which)
        for tail in tails:
            self._used.update(use for use in tail.uses if isinstance(use, LayerUse))
        kappa = tails_flatness(tails, self.settings)
        self._shared.last_kappa = kappa.detach()
        regularized = loss + self.lam * kappa
        assert regularized.grad_fn is not None
        metadata(regularized.grad_fn)[_MARK] = _Mark(plain, by | {id(self._shared)})
        return regularized

    def _without_penalties(self, loss: Tensor) -> _Mark:
        """The loss that kappa is to be computed of, and the FAMs that have regularised it before.

        Another FAM's penalty is no part of the loss, so kappa is that of the loss which it was given.

        Raises:
            RuntimeError: if the loss was changed since, and so cannot be told from the penalty.
        """
        marks = list(_marks(loss))
        by = frozenset().union(*(mark.by for _, mark in marks))
        if not marks or id(self._shared) in by:
            return _Mark(loss, by)
        node, mark = marks[0]
        if node is loss.grad_fn:
            return mark
        raise RuntimeError(
            "the loss was changed after another FAM had regularised it, so its kappa cannot be told from the "
            "loss any more. Scale or add first and regularise last: "
            "second.regularize(first.regularize(loss / k))."
        )

    def _regularize_if_touched(self, loss: Tensor) -> Tensor:
        """As `regularize`, over the layers that the loss depends on: another network's loss passes."""
        plain, by = self._without_penalties(loss)
        if id(self._shared) in by:
            return self._regularize(loss, range(len(self.layers)))
        reasons = [_why_not_used(plain, layer) for layer in self.layers]
        self._missed = next(filter(None, reasons), None)
        which = [i for i, reason in enumerate(reasons) if reason is None]
        return self._regularize(loss, which) if which else loss

    # The step

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of the base optimizer on the gradients of ``loss + lam * kappa``.

        Args:
            closure: runs the forward and returns the scalar loss, or also calls its backward. Without a
                closure the gradients must come from `regularize`.

        Returns:
            What the closure returned, the plain loss; without a closure what the base returns.

        Raises:
            RuntimeError: if nothing was regularised. If the closure raises, weights and optimizer state
                are as before the step.
        """
        if closure is None:
            if not self._shared.may_step and self.lam and self._trains():
                raise RuntimeError(
                    "FAM.step() without a closure expects gradients of loss + lam * kappa, but regularize() "
                    "was not called since the last step. Use optimizer.regularize(loss).backward() before "
                    "optimizer.step(), or pass a closure: optimizer.step(lambda: criterion(model(x), y)). "
                    "Where a trainer calls backward, let it have optimizer.regularize(loss) for the loss."
                )
            return self._finish(self._base_step())
        backup = self._backup() if self._reevaluates else None
        try:
            return self._finish(self._base_step(self._regularized(closure)))
        except BaseException:
            if backup is not None:
                self._restore(backup)
            self._forget()
            raise

    def _regularized(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        """The closure for the base optimizer: backpropagates ``loss + lam * kappa``, returns the loss."""
        evaluations = 0
        accumulates = self._shared.may_step or not self.lam  # what gradients there are, are in order

        def evaluate() -> Any:
            nonlocal evaluations
            evaluations += 1
            self._touched.clear()
            self._unchecked = not accumulates
            with torch.enable_grad(), BackwardInterception(self._transform) as backward:
                result = closure()
            if not backward.seen:
                if accumulates and result is None:  # as Lightning's manual optimisation steps
                    return None
                if evaluations > 1:  # the base tries again, from gradients that are still the last try's
                    self.zero_grad()
                _check_returned(result)
                self._check_gradients()
                self.regularize(result).backward()  # type: ignore[no-untyped-call]  # seen from outside too
            elif self.lam and len(self._touched) < len(self.layers):
                missing = next(i for i in range(len(self.layers)) if i not in self._touched)
                raise LayerNotUsedError(
                    "no loss that was backpropagated in the closure depends on `layer` "
                    f"{_name(self.layers[missing])}, so there is nothing to regularise. Expected the layer "
                    "to be called, as a module, in the forward that made the loss."
                ) from self._missed
            self._unscale_last_kappa(result)
            self._reevaluates = self._reevaluates or evaluations > 1
            return result

        return opaque(evaluate, "fam_optim looks into the graph that the closure builds")

    def _transform(self, loss: Tensor) -> Tensor:
        self._check_gradients()
        before = self.last_kappa
        regularized = self._regularize_if_touched(loss) if self.lam else loss
        self._factors = {} if self.last_kappa is before else _factors(loss)
        return regularized

    def _unscale_last_kappa(self, result: Any) -> None:
        """Makes `last_kappa` that of the loss which the closure returned, where it backpropagated a
        multiple of it (a GradScaler's): whoever logs the two sees them in one unit."""
        if isinstance(result, Tensor) and result.grad_fn in self._factors and self.last_kappa is not None:
            self._shared.last_kappa = self.last_kappa / self._factors[result.grad_fn]
        self._factors = {}

    def _check_gradients(self) -> None:
        """Before the first backward of a closure: refuses to add to gradients that lack their kappa.

        So do loops that accumulate with plain backwards and close with a closure (Lightning with
        accumulate_grad_batches), or that call backward before the step as well (SAM).
        """
        if not self._unchecked:
            return
        self._unchecked = False
        trained = [p for p in self._parameters() if p.requires_grad]
        of_layers = {id(w) for layer in self.layers for w in _weights(layer)}
        watched = [p for p in trained if id(p) in of_layers] or trained
        # zero_grad() has made them None; only zero_grad(set_to_none=False) makes this look at numbers.
        if any(p.grad is not None and bool(p.grad.any()) for p in watched):
            names = ", ".join(_name(layer) for layer in self.layers)
            raise RuntimeError(
                f"the closure would add to gradients that are there already (`layer` {names}), of a backward "
                "that FAM did not see: the sum would lack part of lam * kappa. To accumulate gradients, call "
                "optimizer.regularize(loss) on every micro-batch's loss (in Lightning: `return "
                "self.optimizers().regularize(loss)` in training_step). If they are left from an earlier "
                "step, call optimizer.zero_grad() first. In a loop written for SAM, leave out the backward "
                "before the step, or call optimizer.zero_grad() in the closure."
            )

    def _base_step(self, *args: Any) -> Any:
        # torch wraps `step` of every optimizer class to run step hooks and label the profile. FAM's own
        # step is wrapped, so the base's is called below its wrapper, or hooks would run twice. A scheduler
        # that was built on the base replaces its step, only to note here that it was called. Whoever else
        # replaces it is left in place.
        step = vars(self.base_optimizer).get("step")
        if step is None or hasattr(step, "_wrapped_by_lr_sched"):
            self.base_optimizer._opt_called = True  # type: ignore[attr-defined]
            wrapped = type(self.base_optimizer).step
            step = getattr(wrapped, "__wrapped__", wrapped).__get__(self.base_optimizer)
        return step(*args)

    def _finish(self, result: Any) -> Any:
        self._forget()
        return result

    def _forget(self) -> None:
        """Drops what was recorded of this step's forwards, although the user may keep their losses."""
        for use in list(self._used):
            release(use)
        self._used.clear()
        self._touched.clear()
        self._factors = {}
        self._shared.may_step = False

    def _backup(self) -> tuple[list[Tensor], dict[Tensor, Any]]:
        """Copies of weights and state, for a base that moves the weights between evaluations (LBFGS)."""
        weights = [p.detach().clone() for p in self._parameters()]
        return weights, {p: copy.deepcopy(state) for p, state in self.state.items()}

    def _restore(self, backup: tuple[list[Tensor], dict[Tensor, Any]]) -> None:
        weights, state = backup
        with torch.no_grad():
            for parameter, weight in zip(self._parameters(), weights, strict=True):
                parameter.copy_(weight)
        self.state.clear()
        self.state.update(state)

    def _trains(self) -> bool:
        """Whether a step moves anything: torch.distributed.checkpoint creates the state with one at lr 0."""
        return any(group.get("lr") != 0 for group in self.param_groups)

    def _parameters(self) -> Iterator[Tensor]:
        return (p for group in self.param_groups for p in group["params"])

    # Everything else is the base optimizer's: one storage, nothing copied.

    @property
    def state(self) -> Any:
        """The base optimizer's state."""
        return self.base_optimizer.state

    @state.setter
    def state(self, value: Any) -> None:
        self.base_optimizer.state = value

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The base optimizer's parameter groups."""
        return self.base_optimizer.param_groups

    @param_groups.setter
    def param_groups(self, value: list[dict[str, Any]]) -> None:
        self.base_optimizer.param_groups = value

    @property
    def defaults(self) -> dict[str, Any]:
        """The base optimizer's defaults."""
        return self.base_optimizer.defaults

    @defaults.setter
    def defaults(self, value: dict[str, Any]) -> None:
        self.base_optimizer.defaults = value

    @property
    def _optimizer_step_pre_hooks(self) -> Any:  # type: ignore[override]
        return self.base_optimizer._optimizer_step_pre_hooks

    @property
    def _optimizer_step_post_hooks(self) -> Any:  # type: ignore[override]
        return self.base_optimizer._optimizer_step_post_hooks

    def zero_grad(self, set_to_none: bool = True) -> None:
        """The base optimizer's."""
        self.base_optimizer.zero_grad(set_to_none=set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """The base optimizer's."""
        self.base_optimizer.add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's, which loads it, with lam and the generator's state beside it."""
        for hook in self._optimizer_state_dict_pre_hooks.values():
            hook(self)
        generator = self.settings.generator
        own = {"lam": self.lam, "generator": None if generator is None else generator.get_state()}
        state_dict: dict[str, Any] = {**self.base_optimizer.state_dict(), _CHECKPOINT_KEY: own}
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            state_dict = _or(post_hook(self, state_dict), state_dict)
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a `state_dict` of FAM or of its plain base optimizer (lam stays as it is then)."""
        state_dict = dict(state_dict)
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = _or(hook(self, state_dict), state_dict)
        own = state_dict.pop(_CHECKPOINT_KEY, None)
        self.base_optimizer.load_state_dict(state_dict)
        if own is not None:
            self.lam = own["lam"]
            if self.settings.generator is not None and own["generator"] is not None:
                self.settings.generator.set_state(own["generator"].cpu())
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def __getstate__(self) -> dict[str, Any]:
        return {name: vars(self)[name] for name in ("settings", "layers", "base_optimizer", "_shared")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._start()

    def __repr__(self) -> str:
        layers = ", ".join(_name(layer) for layer in self.layers)
        return f"FAM(lam={self.lam}, mode={self.settings.mode!r}, layer={layers}, base={self.base_optimizer})"

    def _warn_untrained(self) -> None:
        trained = {id(p) for p in self._parameters()}
        for layer in self.layers:
            if not any(id(p) in trained for p in _weights(layer)):
                warnings.warn(
                    f"the weight of `layer` {_name(layer)} is not among the parameters given to FAM: its "
                    "kappa is computed and regularises the others, but it is not trained. Add it to `params` "
                    "if it should be.",
                    stacklevel=3,
                )


def _as_layers(layer: Any) -> tuple[Layer, ...]:
    several = layer if isinstance(layer, (list, tuple)) else (layer,)
    if not several:
        raise ValueError("expected `layer` to name at least one layer, got an empty sequence.")
    for one in several:
        if not isinstance(one, (nn.Module, nn.Parameter)):
            raise TypeError(
                f"expected `layer` to be an nn.Module or an nn.Parameter, got {type(one).__name__}: {one!r}."
            )
        if isinstance(one, nn.Parameter):
            parameter_use(one)
    if len({id(one) for one in several}) < len(several):
        raise ValueError("expected `layer` to name different layers, got the same one twice.")
    return tuple(Observation(one) if isinstance(one, nn.Module) else one for one in several)


def _build_base(base_optimizer: Any, params: Any, base_kwargs: dict[str, Any]) -> Optimizer:
    if isinstance(base_optimizer, Optimizer):
        raise TypeError(
            "expected `base_optimizer` to be a class or callable (params, **kwargs) -> Optimizer, got an "
            f"instance of {type(base_optimizer).__name__}. Pass the class and its arguments: "
            f"FAM(params, {type(base_optimizer).__name__}, layer, lr=...)."
        )
    if not callable(base_optimizer):
        raise TypeError(
            "expected `base_optimizer` to be a class or callable (params, **kwargs) -> Optimizer, got "
            f"{base_optimizer!r}."
        )
    base = base_optimizer(params, **base_kwargs)
    if not isinstance(base, Optimizer):
        raise TypeError(
            "expected `base_optimizer` to make a torch.optim.Optimizer, got a "
            f"{type(base).__name__} from {base_optimizer!r}."
        )
    return base


def _marks(loss: Any) -> Iterator[tuple[Node, _Mark]]:
    """The regularised losses that `loss` was made of by arithmetic on scalars: ``loss / 4``, ``a + b``."""
    stack = [loss.grad_fn] if isinstance(loss, Tensor) else []
    seen = set(stack)
    while stack:
        node = stack.pop()
        if node is None or any(math.prod(made.shape) != 1 for made in node._input_metadata):
            continue
        if _MARK in metadata(node):
            yield node, metadata(node)[_MARK]
            continue
        below = {n for n, _ in node.next_functions} - seen
        seen |= below
        stack.extend(below)


def _factors(loss: Tensor) -> dict[Node, Tensor]:
    """The scalars that `loss` is a multiple of, by their nodes, and the factors."""
    factors: dict[Node, Tensor] = {}
    node = loss.grad_fn
    while node is not None and node.name().startswith(("MulBackward", "DivBackward")):
        below = [(n, output) for n, output in node.next_functions if n is not None]
        if len(below) != 1:
            break
        edge = GradientEdge(*below[0])
        node = edge.node
        (factor,) = torch.autograd.grad(loss, edge, retain_graph=True)
        factors[node] = factor.reshape(())
    return factors


def _check_returned(result: Any) -> None:
    if not isinstance(result, Tensor) or result.grad_fn is None:
        raise RuntimeError(
            "expected the closure to return the loss as a tensor with its graph, or to call "
            f"loss.backward() itself; it called no backward and returned {result!r}. (In Lightning's manual "
            "optimisation, call self.manual_backward(optimizer.regularize(loss)) before optimizer.step().)"
        )


def _why_not_used(loss: Tensor, layer: Layer) -> LayerNotUsedError | None:
    try:
        find_tail(loss, layer)
    except LayerNotUsedError as error:
        return error.with_traceback(None)  # whose frames would keep the graph
    return None


def _weights(layer: Layer) -> list[Tensor]:
    """The parameters behind a layer's weight: the weight itself, or what it is parametrised by."""
    if isinstance(layer, Tensor):
        return [layer]
    source = parametrization(layer.module)
    if source is not None:
        return list(source.parameters())
    own = dict(layer.module.named_parameters(recurse=False))
    if "weight" in own:
        return [own["weight"]]
    # Pruning and the older weight_norm and spectral_norm compute `weight` in a pre-hook, from weight_*.
    return [p for name, p in own.items() if name.startswith("weight_")]


def _name(layer: Layer) -> str:
    return describe(layer.module if isinstance(layer, Observation) else layer)


def _or(result: Any, default: Any) -> Any:
    return default if result is None else result
