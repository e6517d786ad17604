"""The optimizer FAM wraps a base optimizer and keeps layers of the network flat while the base trains them.

Source: Adilova et al., FAM: Relative Flatness Aware Minimization, 2023 (arXiv 2307.02337).
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from fam_optim.closure import WatchedClosure
from fam_optim.construction import build_base, build_regularizer, checked_lam, warn_untrained
from fam_optim.layer.use import describe
from fam_optim.layers import weight_layers
from fam_optim.wrapper import OptimizerWrapper, undone_if_it_fails


class FAM(OptimizerWrapper):
    """Keeps layers of a network flat while a base optimizer trains it.

    >>> optimizer = FAM.for_model(model, torch.optim.SGD, lr=0.05, momentum=0.9)
    >>> optimizer.zero_grad()
    >>> loss = optimizer.step(lambda: criterion(model(x), y))

    This builds ``FAM(model.parameters(), torch.optim.SGD, weight_layers(model)[:-1], mode="proximal", ...)``.
    With mode="proximal" and every=10, the default, a step

    1.  runs the closure and backpropagates its loss (every tenth time twice, to estimate its curvature T);
    2.  lets the base optimizer step on these gradients;
    3.  every tenth time moves each layer's weight W to ``(I + 2 c T)^-1 W``, `lam` times as far as the loss
        moves it in ten steps; this lowers kappa, the relative flatness of the layer;
    4.  returns what the closure returned.

    In the other modes, the paper's, every step backpropagates ``loss + lam * kappa``: loss and *penalty*.

    The closure returns the loss. It may call ``loss.backward()`` itself, as closures for LBFGS or Lightning
    do. FAM does not zero the gradients. A loop without a closure calls
    ``optimizer.regularize(loss).backward()`` and ``optimizer.step()``.

    Args:
        params: parameters or parameter groups for the base optimizer.
        base_optimizer: a class or callable ``(params, **base_kwargs) -> torch.optim.Optimizer``.
        layer: the layer to keep flat: an nn.Linear, a convolution or transposed convolution, Hugging Face's
            Conv1D, an nn.Parameter with one row per output (mode="exact" then needs "gauss_newton"), or a
            sequence of these, such as all layers but the last, ``weight_layers(model)[:-1]``.
        lam: with mode="proximal", how far kappa pulls each weight, relative to the loss; 1 by default (0.5 is
            safer with AdamW). In other modes, the weight of kappa in the loss; 0.008 by default. With 0 a
            step is exactly the base's. You may change it at any time.
        mode: "proximal", or how to compute the penalty's kappa: "exact" (the default), "full" (forms the
            Hessian; for tiny layers) or "hutchinson" (random probes, unbiased).
        every: number of steps from one proximal step to the next, 10 by default; only for mode="proximal".
        measure: "neuronwise" (the default; paper, section 1) or "layerwise" (section 3.2). Penalty only.
        curvature: "hessian" (the default, as in the paper) or "gauss_newton", the part of it that is never
            negative; with mode="hutchinson" all layers together then cost one backward. Penalty only.
        normalize: divide kappa by the layer's number of inputs, as the authors' code does, so that the
            paper's lambda values apply. Penalty only.
        detach_hessian: hold the Hessian constant, which keeps only the part of kappa's gradient that goes
            through the layer's own weights, (I) of the paper's Lemma 1. Penalty only.
        n_samples: number of random signs or probes, at least 1 (proximal, hutchinson).
        generator: source of the randomness, by default FAM's own with torch's seed; `state_dict` resumes it.
        **base_kwargs: arguments for the base optimizer: lr, momentum, ...

    Attributes:
        lam: the argument `lam`.
        base_optimizer: the owner of ``state``, ``param_groups`` and ``defaults``, which FAM shares.
        last_kappa: kappa at the last proximal step, or as it last entered the penalty, detached; or None.
        last_penalty: ``lam * kappa`` as it was last added to a loss; None with mode="proximal".

    Raises:
        TypeError: if the layer has no weight matrix, or the base is not an optimizer.
        ValueError: for a negative or non-finite lam, an unknown mode or measure, a parameter in mode exact
            with the Hessian, an argument that means nothing in this mode, or LBFGS with mode="proximal".

    Warns:
        UserWarning: if a layer's weight is neither frozen nor among `params`, and so is not trained.

    Cost of mode="proximal": one more backward, a copy of the layers' weights, and products of ``d^2 m`` per
    weight ``(d, m)`` at every tenth step; nothing at other steps. For a penalty see `relative_flatness`.
    """

    _evaluations = 0  # the most often that one step has evaluated its closure

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
        of_penalty = (measure, curvature, normalize, detach_hessian)
        regularizer = build_regularizer(layer, lam, mode, every, of_penalty, n_samples, generator)
        self._start(build_base(base_optimizer, params, base_kwargs), regularizer)
        warn_untrained(regularizer)

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
    ) -> "FAM":
        """Builds a FAM with the recommended settings: all weight layers but the last, ``mode="proximal"``.

        >>> optimizer = FAM.for_model(model, torch.optim.SGD, lr=0.05, momentum=0.9)

        Args:
            model: the network, whose weight layers `weight_layers` finds.
            base_optimizer, lam, every: as in `FAM`.
            params: parameters or parameter groups for the base optimizer; by default all of the model's.
            **base_kwargs: arguments for the base optimizer: lr, momentum, ...

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

    @property
    def lam(self) -> float:
        """How far kappa pulls the weights, relative to the loss; with a penalty, the weight of kappa."""
        return self.regularizer.lam

    @lam.setter
    def lam(self, value: float) -> None:
        self.regularizer.change_lam(checked_lam(value))

    @property
    def last_kappa(self) -> Tensor | None:
        """kappa at the last proximal step, or as it last entered the penalty; detached."""
        return self.regularizer.last_kappa

    @property
    def last_penalty(self) -> Tensor | None:
        """``lam * kappa`` as it was last added to a loss, detached; None before, and with mode="proximal"."""
        kappa, lam = self.regularizer.last_kappa, self.regularizer.last_lam
        return None if kappa is None or lam is None else lam * kappa

    def regularize(self, loss: Tensor) -> Tensor:
        """Returns what to backpropagate in place of a loss, for loops that call backward themselves.

        >>> scaler.scale(optimizer.regularize(loss)).backward()
        >>> scaler.step(optimizer)

        With mode="proximal" it returns the loss itself, and first estimates its curvature if a proximal step
        is due. In other modes it returns ``loss + lam * kappa``. Call it on every micro-batch's loss.

        Args:
            loss: the scalar loss, before its backward; its forward must have run after FAM was built.

        Raises:
            RuntimeError: if a penalty's loss depends on no layer, if the curvature is not known, or for the
                reasons that `relative_flatness` names.
        """
        regularized = self.regularizer.regularize(loss)
        self.regularizer.given = True
        return regularized

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Zeroes the gradients, as the base optimizer does, and forgets the losses backpropagated so far."""
        super().zero_grad(set_to_none)
        self.regularizer.gradients_zeroed()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Makes one step of the base optimizer and keeps the layers flat.

        Args:
            closure: runs the forward and returns the scalar loss; it may call backward too. Without a
                closure the gradients must come from `regularize`.

        Returns:
            What the closure returned, that is the plain loss; without a closure what the base returns.

        Raises:
            RuntimeError: if nothing was regularised. If the closure raises, nothing has changed.
        """
        if closure is None:
            return self._step_on_gradients()
        check = self._ready  # runs after the closure, when its backward has freed its memory
        if not self._is_torchs_own():  # such a base may move weights before it calls the closure
            check = self._check
            self.regularizer.before_step()
        # Only a closure that has trained before may skip: one that never does lacks its `return`.
        evaluated = WatchedClosure(closure, self, check, may_skip=self._evaluations > 0)
        with undone_if_it_fails(self) if self._may_reevaluate() else nullcontext():
            result = self._base_step(evaluated)
        self._evaluations = max(self._evaluations, evaluated.evaluations)
        self.regularizer.after_step()
        return evaluated.returned if evaluated.evaluations else result

    def _step_on_gradients(self) -> Any:
        """Makes a step without a closure, on the gradients that `regularize` led to."""
        if self.lam and not self.regularizer.given and self._trains():
            raise RuntimeError(
                "FAM.step() without a closure expects gradients of a regularised loss, but regularize() was "
                "not called since the last step. Use optimizer.regularize(loss).backward() before it, or "
                "pass a closure: optimizer.step(lambda: criterion(model(x), y)). If a trainer calls "
                "backward, let it have optimizer.regularize(loss) for the loss."
            )
        self._ready()
        result = self._base_step()
        if self.regularizer.given or self._trains():  # else nothing was trained, and it counts as no step
            self.regularizer.after_step()
        return result

    def _check(self) -> None:
        """Raises RuntimeError if no step may be made on the present gradients."""
        if self.lam and self._trains():
            self.regularizer.check()

    def _ready(self) -> None:
        """Checks the gradients and prepares the regulariser, just before the base moves the weights."""
        self._check()
        self.regularizer.before_step()

    def _may_reevaluate(self) -> bool:
        """Returns whether the base may evaluate the closure again, and fail, after it has moved the weights.
        LBFGS does. A base that is not torch's own may, until one of its steps has shown otherwise."""
        lbfgs = isinstance(self.base_optimizer, LBFGS)
        return lbfgs or self._evaluations > 1 or not (self._evaluations or self._is_torchs_own())

    def _trains(self) -> bool:
        """Returns False if every lr is 0: torch.distributed.checkpoint makes such a step to create state."""
        return any(group.get("lr") != 0 for group in self.param_groups)

    def __repr__(self) -> str:
        return f"FAM({self.regularizer}, base={self.base_optimizer})"
