"""FAM, the optimizer: minimises ``loss + lam * kappa`` and hands the step to a base optimizer.

Source: Adilova et al., FAM: Relative Flatness Aware Minimization, 2023 (arXiv 2307.02337), equation 3.
"""

from __future__ import annotations

import math
import warnings
from typing import TYPE_CHECKING, Any, Literal

from torch.optim import LBFGS, Optimizer

from fam_optim.backup import Backup
from fam_optim.closure import RegularizedClosure, SeenClosure
from fam_optim.flatness import Settings
from fam_optim.gradients import FiniteGuard
from fam_optim.layer.use import describe
from fam_optim.layers import name_of, weight_layers, weights_of
from fam_optim.penalty import Penalty
from fam_optim.proximal import Proximal
from fam_optim.wrapper import OptimizerWrapper

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch
    from torch import Tensor, nn

_CHECKPOINT_KEY = "fam"


class FAM(OptimizerWrapper):
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
        layer: what is kept flat: an nn.Linear, nn.Conv1d/2d/3d or nn.ConvTranspose1d/2d/3d; an nn.Parameter
            (modes full and hutchinson); or a sequence of these, such as all but the last,
            ``weight_layers(model)[:-1]``, whose kappas are added. On a last layer with a convex loss
            kappa is never negative; on layers below it can be, as the loss need not be convex in their
            weights (unless curvature is "gauss_newton").
        lam: weight of kappa, at least 0; may be changed at any time. At 0 the step is the base's, bit
            for bit. On a last layer 0.008 with detach_hessian lost least against tuning it
            (recipes/study/LAST_LAYER.md); on all hidden layers start with 0.003 (recipes/study/README.md).
        mode: "exact", "full" (forms the Hessian; tiny layers) or "hutchinson" (random probes, unbiased).
        measure: "neuronwise" (paper, section 1) or "layerwise" (section 3.2).
        curvature: "hessian" (the paper's) or "gauss_newton": its part that is never negative, on any layer,
            for all layers at the price of one backward (mode "hutchinson"); behind BatchNorm too. For
            softmax cross-entropy, binary cross-entropy with logits, squared error and sums of these.
        normalize: divide kappa by the number of the layer's inputs, as the authors' code does; the paper's
            lambdas apply then.
        detach_hessian: hold the Hessian constant: keep only the part of kappa's gradient that goes through
            the layer's own weights, (I) of the paper's Lemma 1.
        n_samples: probes per step, at least 1 (hutchinson).
        generator: of the probes, by default torch's global one; its state is in `state_dict` (hutchinson).
        **base_kwargs: for the base optimizer: lr, momentum, ...

    Attributes:
        lam: weight of kappa; may be set.
        base_optimizer: owns ``state``, ``param_groups`` and ``defaults``; FAM's are the same objects.
        last_kappa: kappa of the loss as it last entered the penalty, detached, on the device; None before.
        last_penalty: ``lam * kappa`` then: what part of the objective it is.

    Raises:
        TypeError: if the layer has no weight matrix, or the base is not an optimizer.
        ValueError: for a negative or non-finite lam, an unknown mode or measure, exact with a parameter.

    Warns:
        UserWarning: if the layer's weight is not among `params`: it is measured but not trained.

    Cost: that of `relative_flatness`, in tail backwards: about one for a softmax cross-entropy head.
    """

    penalty: Penalty | None
    proximal: Proximal | None

    def __init__(
        self,
        params: Any,
        base_optimizer: Callable[..., Optimizer],
        layer: nn.Module | nn.Parameter | Sequence[nn.Module | nn.Parameter],
        lam: float | None = None,
        mode: Literal["proximal", "exact", "full", "hutchinson"] = "exact",
        *,
        every: int | None = None,
        measure: Literal["neuronwise", "layerwise"] | None = None,
        curvature: Literal["hessian", "gauss_newton"] | None = None,
        normalize: bool | None = None,
        detach_hessian: bool | None = None,
        n_samples: int = 1,
        generator: torch.Generator | None = None,
        **base_kwargs: Any,
    ) -> None:
        form = {
            "measure": measure,
            "curvature": curvature,
            "normalize": normalize,
            "detach_hessian": detach_hessian,
        }
        given: dict[str, Any] = {name: value for name, value in form.items() if value is not None}
        self.penalty = self.proximal = None
        if mode == "proximal":
            _refuse_penalty_arguments(given)
            own = 10 if every is None else every
            layers = layer if isinstance(layer, (list, tuple)) else (layer,)
            self.proximal = Proximal(layers, _checked(1.0 if lam is None else lam), own, n_samples, generator)
        else:
            if every is not None:
                raise ValueError(
                    f"expected `every` with mode='proximal' alone, got it with mode={mode!r}, whose "
                    "penalty is in every step. Leave it out."
                )
            settings = Settings(mode=mode, n_samples=n_samples, generator=generator, **given)
            self.penalty = Penalty(layer, _checked(8e-3 if lam is None else lam), settings)
        self._start(_build_base(base_optimizer, params, base_kwargs, mode == "proximal"))
        self._warn_untrained()

    @classmethod
    def for_model(
        cls,
        model: nn.Module,
        base_optimizer: Callable[..., Optimizer],
        *,
        lam: float = 1.0,
        every: int = 10,
        params: Any = None,
        **base_kwargs: Any,
    ) -> FAM:
        """The recommended settings: all weight layers but the last, ``mode="proximal"``.

        >>> optimizer = FAM.for_model(model, torch.optim.SGD, lr=0.05, momentum=0.9)

        Args:
            model: its weight layers are those of `weight_layers`.
            base_optimizer: as in `FAM`.
            lam, every: as in `FAM`.
            params: parameters or parameter groups for the base optimizer; by default all of the model's.
            **base_kwargs: for the base optimizer: lr, momentum, ...

        Raises:
            ValueError: if the model has fewer than two weight layers.
        """
        hidden = weight_layers(model)[:-1]
        if not hidden:
            raise ValueError(
                "expected a model with at least two weight layers, of which all but the last are kept flat, "
                f"got {describe(model)}. Name the layer: FAM(params, base_optimizer, layer, mode='proximal')."
            )
        trained = model.parameters() if params is None else params
        return cls(trained, base_optimizer, hidden, lam, "proximal", every=every, **base_kwargs)

    def _start(self, base_optimizer: Optimizer) -> None:
        """What a new, copied or unpickled FAM needs beside its attributes."""
        self._wrap(base_optimizer)
        if self.penalty is not None:
            self.penalty.start(self._parameters())
        self._guard = FiniteGuard()
        self._evaluations = 0  # of a closure, at most in one step

    # The regulariser

    @property
    def _regularizer(self) -> Penalty | Proximal:
        found = self.proximal or self.penalty
        assert found is not None
        return found

    @property
    def lam(self) -> float:
        """How far kappa pulls the weights, relative to the loss; of the penalty, the weight of kappa."""
        return self._regularizer.lam

    @lam.setter
    def lam(self, value: float) -> None:
        self._regularizer.lam = _checked(value)

    @property
    def last_kappa(self) -> Tensor | None:
        """kappa of the last due step's loss, or as it last entered the penalty; detached."""
        return self._regularizer.last_kappa

    @property
    def last_penalty(self) -> Tensor | None:
        """``lam * kappa`` as it was last added to a loss, detached; None before, and with mode="proximal"."""
        if self.penalty is None or self.penalty.last_kappa is None:
            return None
        return self.penalty.last_lam * self.penalty.last_kappa

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
        if self.proximal is not None:
            self.proximal.see(loss)
        elif self.penalty is not None and self.lam:
            loss = self.penalty.add(loss)
        self._regularizer.given = True
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Zeroes the gradients, as the base optimizer does."""
        super().zero_grad(set_to_none)
        if self.proximal is not None:
            self.proximal.forget_backpropagated()

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
            if self.lam and not self._regularizer.given and self._trains():
                raise RuntimeError(
                    "FAM.step() without a closure expects gradients of loss + lam * kappa, but regularize() "
                    "was not called since the last step. Use optimizer.regularize(loss).backward() before "
                    "optimizer.step(), or pass a closure: optimizer.step(lambda: criterion(model(x), y)). "
                    "Where a trainer calls backward, let it have optimizer.regularize(loss) for the loss."
                )
            return self._step_on_gradients()
        regularized = self._regularized(closure)
        backup = Backup(self) if self._may_reevaluate() else None
        before = None if self.proximal is None else self.proximal.before()
        try:
            result = self._base_step(regularized)
        except BaseException:
            if backup is not None:
                backup.restore()
            self._regularizer.forget()
            raise
        finally:
            self._evaluations = max(self._evaluations, regularized.evaluations)
        self._finish(before)
        return regularized.returned if regularized.evaluations else result

    def _step_on_gradients(self) -> Any:
        """The step without a closure."""
        before = None
        if self.penalty is not None:
            self._check_gradients(self.penalty)
        elif self.proximal is not None:
            if self.proximal.due and self.proximal.given:
                self.proximal.check()
            before = self.proximal.before()
        result = self._base_step()
        self._finish(before)
        return result

    def _regularized(self, closure: Callable[[], Any]) -> RegularizedClosure | SeenClosure:
        if self.penalty is None:
            assert self.proximal is not None
            return SeenClosure(closure, self.proximal, self.zero_grad)
        penalty = self.penalty
        return RegularizedClosure(
            closure,
            penalty,
            check=lambda: self._check_gradients(penalty),
            zero_grad=self.zero_grad,
        )

    def _check_gradients(self, penalty: Penalty) -> None:
        """Raises RuntimeError if no step may be made on the gradients that are there."""
        if penalty.lam and self._trains():
            penalty.ledger.check(penalty.names)
        self._guard.check(penalty, self._parameters())

    def _finish(self, before: list[Tensor] | None) -> None:
        if self.proximal is not None:
            self.proximal.after(before)
        elif self.penalty is not None:
            self.penalty.forget()

    def _may_reevaluate(self) -> bool:
        """Whether the base may move the weights and then evaluate the closure again, which may fail: as LBFGS
        does, and as any base may that is not torch's own, until a step of it has shown otherwise."""
        own = type(self.base_optimizer).__module__.startswith("torch.optim.")
        return (
            isinstance(self.base_optimizer, LBFGS) or self._evaluations > 1 or not (own or self._evaluations)
        )

    def _trains(self) -> bool:
        """Whether a step moves anything: torch.distributed.checkpoint creates the state with one at lr 0."""
        return any(group.get("lr") != 0 for group in self.param_groups)

    # Copies and checkpoints

    def _own_state(self) -> dict[str, Any]:
        own: dict[str, Any] = {"lam": self.lam}
        if self.proximal is not None:
            own["proximal"] = self.proximal.state()
        elif self.penalty is not None:
            generator = self.penalty.settings.generator
            own["generator"] = None if generator is None else generator.get_state()
        return {_CHECKPOINT_KEY: own}

    def _load_own_state(self, own: dict[str, Any]) -> None:
        saved = own.get(_CHECKPOINT_KEY)
        if saved is None:  # of a plain base optimizer: lam stays as it is
            return
        self.lam = saved["lam"]
        if self.proximal is not None and "proximal" in saved:
            self.proximal.load(saved["proximal"])
        generator = None if self.penalty is None else self.penalty.settings.generator
        if generator is not None and saved.get("generator") is not None:
            generator.set_state(saved["generator"].cpu())

    def __getstate__(self) -> dict[str, Any]:
        return {
            "penalty": self.penalty,
            "proximal": self.proximal,
            "base_optimizer": self.base_optimizer,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.penalty, self.proximal = state["penalty"], state["proximal"]
        self._start(state["base_optimizer"])

    def __repr__(self) -> str:
        if self.proximal is not None:
            settings = f"mode='proximal', lam={self.lam}, every={self.proximal.every}"
        else:
            assert self.penalty is not None
            settings = f"mode={self.penalty.settings.mode!r}, lam={self.lam}"
        return f"FAM({settings}, layer={self._regularizer.names}, base={self.base_optimizer})"

    def _warn_untrained(self) -> None:
        trained = {id(p) for p in self._parameters()}
        layers = [] if self.penalty is None else self.penalty.layers
        named = [(name_of(layer), weights_of(layer)) for layer in layers]
        if self.proximal is not None:
            named = [(w.name, [w.parameter]) for w in self.proximal.weights]
        for name, weights in named:
            if not any(id(p) in trained for p in weights):
                warnings.warn(
                    f"the weight of `layer` {name} is not among the parameters given to FAM: it is not "
                    "trained (as a penalty its kappa still regularises the others). Add it to `params`, or "
                    "leave it out of `layer`.",
                    stacklevel=3,
                )


def _checked(lam: float) -> float:
    if not (math.isfinite(lam) and lam >= 0):
        raise ValueError(f"expected `lam` to be finite and at least 0, got {lam!r}.")
    return float(lam)


def _refuse_penalty_arguments(given: dict[str, Any]) -> None:
    """Raises ValueError for what the proximal step has no use for."""
    meaningless = {
        name: value for name, value in given.items() if (name, value) != ("curvature", "gauss_newton")
    }
    if meaningless:
        listed = ", ".join(f"{name}={value!r}" for name, value in meaningless.items())
        raise ValueError(
            f"got {listed} with mode='proximal', which is neuronwise, with Gauss-Newton curvature that is "
            "held constant, and has no unit. Leave that out, or use mode='hutchinson'."
        )


def _build_base(base_optimizer: Any, params: Any, base_kwargs: dict[str, Any], proximal: bool) -> Optimizer:
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
    if proximal and isinstance(base, LBFGS):
        raise ValueError(
            "mode='proximal' moves the weights between steps, and LBFGS's history of them would be wrong. "
            "Use another base optimizer, or mode='hutchinson' with curvature='gauss_newton'."
        )
    if not isinstance(base, Optimizer):
        raise TypeError(
            "expected `base_optimizer` to make a torch.optim.Optimizer, got a "
            f"{type(base).__name__} from {base_optimizer!r}."
        )
    return base
