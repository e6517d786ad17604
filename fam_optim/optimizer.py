"""FAM, the optimizer: minimises ``loss + lam * kappa`` and hands the step to a base optimizer.

Source: Adilova et al., FAM: Relative Flatness Aware Minimization, 2023 (arXiv 2307.02337), equation 3.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from torch.optim import LBFGS, Optimizer

from fam_optim.backup import Backup
from fam_optim.closure import RegularizedClosure
from fam_optim.flatness import Settings
from fam_optim.gradients import FiniteGuard, check_complete, mark_stepped_on
from fam_optim.interception import unseen
from fam_optim.layers import name_of, weights_of
from fam_optim.penalty import Penalty
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
        lam: float = 8e-3,
        mode: str = "exact",
        *,
        measure: str = "neuronwise",
        curvature: str = "hessian",
        normalize: bool = False,
        detach_hessian: bool = False,
        n_samples: int = 1,
        generator: torch.Generator | None = None,
        **base_kwargs: Any,
    ) -> None:
        settings = Settings(measure, mode, normalize, n_samples, generator, detach_hessian, curvature)
        self.penalty = Penalty(layer, lam, settings)
        self._start(_build_base(base_optimizer, params, base_kwargs))
        self._warn_untrained()

    def _start(self, base_optimizer: Optimizer) -> None:
        """What a new, copied or unpickled FAM needs beside its attributes."""
        self._wrap(base_optimizer)
        self.penalty.start()
        self._guard = FiniteGuard()
        self._evaluations = 0  # of a closure, at most in one step

    # The penalty

    @property
    def lam(self) -> float:
        """Weight of kappa."""
        return self.penalty.lam

    @lam.setter
    def lam(self, value: float) -> None:
        self.penalty.lam = value

    @property
    def last_kappa(self) -> Tensor | None:
        """kappa as it last entered the penalty, detached."""
        return self.penalty.last_kappa

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
        regularized = self.penalty.add(loss) if self.lam else loss
        self.penalty.given = True
        return regularized

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Zeroes the gradients, as the base optimizer does."""
        unseen(super().zero_grad, set_to_none)  # it asks for every parameter's gradient, and sets it

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
            if self.lam and not self.penalty.given and self._trains():
                raise RuntimeError(
                    "FAM.step() without a closure expects gradients of loss + lam * kappa, but regularize() "
                    "was not called since the last step. Use optimizer.regularize(loss).backward() before "
                    "optimizer.step(), or pass a closure: optimizer.step(lambda: criterion(model(x), y)). "
                    "Where a trainer calls backward, let it have optimizer.regularize(loss) for the loss."
                )
            self._guard.check(self.penalty, self._parameters())
            result = self._base_step()
            self._finish()
            return result
        regularized = self._regularized(closure)
        backup = Backup(self) if self._may_reevaluate() else None
        try:
            result = self._base_step(regularized)
        except BaseException:
            if backup is not None:
                backup.restore()
            self.penalty.forget()
            raise
        finally:
            self._evaluations = max(self._evaluations, regularized.evaluations)
        self._finish()
        return regularized.returned if regularized.evaluations else result

    def _regularized(self, closure: Callable[[], Any]) -> RegularizedClosure:
        return RegularizedClosure(
            closure,
            self.penalty,
            before=lambda: check_complete(self.penalty, self._parameters()),
            after=lambda: self._guard.check(self.penalty, self._parameters()),
            zero_grad=self.zero_grad,
        )

    def _finish(self) -> None:
        self.penalty.forget()
        mark_stepped_on(self.penalty, self._parameters())

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
        generator = self.penalty.settings.generator
        state = None if generator is None else generator.get_state()
        return {_CHECKPOINT_KEY: {"lam": self.lam, "generator": state}}

    def _load_own_state(self, own: dict[str, Any]) -> None:
        saved = own.get(_CHECKPOINT_KEY)
        if saved is None:  # of a plain base optimizer: lam stays as it is
            return
        self.lam = saved["lam"]
        generator = self.penalty.settings.generator
        if generator is not None and saved["generator"] is not None:
            generator.set_state(saved["generator"].cpu())

    def __getstate__(self) -> dict[str, Any]:
        return {"penalty": self.penalty, "base_optimizer": self.base_optimizer}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.penalty = state["penalty"]
        self._start(state["base_optimizer"])

    def __repr__(self) -> str:
        mode = self.penalty.settings.mode
        return f"FAM(lam={self.lam}, mode={mode!r}, layer={self.penalty.names}, base={self.base_optimizer})"

    def _warn_untrained(self) -> None:
        trained = {id(p) for p in self._parameters()}
        for layer in self.penalty.layers:
            if not any(id(p) in trained for p in weights_of(layer)):
                warnings.warn(
                    f"the weight of `layer` {name_of(layer)} is not among the parameters given to FAM: its "
                    "kappa is computed and regularises the others, but it is not trained. Add it to `params` "
                    "if it should be.",
                    stacklevel=3,
                )


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
