"""FAM, the optimizer: minimises ``loss + lam * kappa`` and hands the step to a base optimizer.

Source: Adilova et al., FAM: Relative Flatness Aware Minimization, 2023 (arXiv 2307.02337), equation 3.
"""

from __future__ import annotations

import copy
import warnings
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge
from torch.optim import LBFGS, Optimizer

from fam_optim.compilation import opaque
from fam_optim.flatness import Settings
from fam_optim.interception import BackwardInterception, unseen
from fam_optim.penalty import Penalty, name_of, weights_of
from fam_optim.wrapper import OptimizerWrapper

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import nn
    from torch.autograd.graph import Node

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
        layer: what is kept flat: an nn.Linear, nn.Conv1d/2d/3d or nn.ConvTranspose1d/2d/3d, usually the
            last or last but one; an nn.Parameter (modes full and hutchinson); or a sequence of these,
            whose kappas are added. On a last layer with a convex loss kappa is never negative; on
            layers below it can be, as the loss need not be convex in their weights.
        lam: weight of kappa, at least 0; may be changed at any time. At 0 the step is the base's, bit
            for bit. On plain kappa one value does for many widths, learning rates and optimizers: 0.008,
            with detach_hessian, is the one that lost least against tuning it (recipes/STUDY.md).
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
        lam: float = 8e-3,
        mode: str = "exact",
        *,
        measure: str = "neuronwise",
        normalize: bool = False,
        detach_hessian: bool = False,
        n_samples: int = 1,
        generator: torch.Generator | None = None,
        **base_kwargs: Any,
    ) -> None:
        settings = Settings(measure, mode, normalize, n_samples, generator, detach_hessian)
        self.penalty = Penalty(layer, lam, settings)
        self._start(_build_base(base_optimizer, params, base_kwargs))
        self._warn_untrained()

    def _start(self, base_optimizer: Optimizer) -> None:
        """What a new, copied or unpickled FAM needs beside its attributes."""
        self._wrap(base_optimizer)
        self.penalty.start()
        self._reevaluates = isinstance(base_optimizer, LBFGS)

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
        """The base optimizer's."""
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
            result = self._base_step()
            self._finish()
            return result
        backup = self._backup() if self._reevaluates else None
        try:
            result = self._base_step(self._regularized(closure))
        except BaseException:
            if backup is not None:
                self._restore(backup)
            self.penalty.forget()
            raise
        self._finish()
        return result

    def _regularized(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        """The closure for the base optimizer: backpropagates ``loss + lam * kappa``, returns the loss."""
        evaluations = 0
        accumulates = self.penalty.given or not self.lam  # what gradients there are, are in order
        checked = accumulates
        factors: dict[Node, Tensor] = {}

        def transform(loss: Tensor) -> Tensor:
            nonlocal checked
            if not checked:  # the closure's first backward, whatever of: the others add to it rightly
                self._check_gradients()
                checked = True
            before = self.last_kappa
            regularized = self.penalty.add_where_touched(loss) if self.lam else loss
            if self.last_kappa is not before:
                factors.update(_factors(loss))
            return regularized

        def evaluate() -> Any:
            nonlocal evaluations, checked
            evaluations += 1
            checked = accumulates
            self._reevaluates = self._reevaluates or evaluations > 1
            self.penalty.begin()
            factors.clear()
            with torch.enable_grad(), BackwardInterception(transform) as backward:
                result = closure()
            if backward.seen:
                if self.lam:
                    self.penalty.check_all_touched()
                self._unscale_last_kappa(result, factors)
            elif not (accumulates and result is None):  # None: Lightning's manual optimisation just steps
                if evaluations > 1:  # the base tries again, from gradients that are still the last try's
                    self.zero_grad()
                _check_returned(result)
                if not accumulates:
                    self._check_gradients()
                self.regularize(result).backward()  # type: ignore[no-untyped-call]  # seen from outside too
            return result

        return partial(_untraced, evaluate)

    def _unscale_last_kappa(self, result: Any, factors: dict[Node, Tensor]) -> None:
        """Makes `last_kappa` that of the loss which the closure returned, where it backpropagated a
        multiple of it (a GradScaler's): whoever logs the two sees them in one unit."""
        if isinstance(result, Tensor) and result.grad_fn in factors and self.last_kappa is not None:
            self.penalty.last_kappa = self.last_kappa / factors[result.grad_fn]

    def _check_gradients(self) -> None:
        """Before the first backward of a closure: refuses to add to gradients that lack their kappa.

        So do loops that accumulate with plain backwards and close with a closure (Lightning with
        accumulate_grad_batches), or that call backward before the step as well (SAM). Gradients that are
        still those of FAM's last step are in order: whoever does not zero them, accumulates.
        """
        for p in self._watched():
            if p.grad is None or getattr(p.grad, "_of_fam_step", None) == p.grad._version:
                continue
            if not bool(p.grad.any()):  # only zero_grad(set_to_none=False) makes this look at numbers
                continue
            names = ", ".join(name_of(layer) for layer in self.penalty.layers)
            raise RuntimeError(
                f"the closure would add to gradients that are there already (`layer` {names}), of a backward "
                "that FAM did not see: the sum would lack part of lam * kappa. To accumulate gradients, call "
                "optimizer.regularize(loss) on every micro-batch's loss (in Lightning: `return "
                "self.optimizers().regularize(loss)` in training_step). If they are left from training "
                "without FAM, call optimizer.zero_grad() first. In a loop written for SAM, leave out the "
                "backward before the step, or call optimizer.zero_grad() in the closure."
            )

    def _finish(self) -> None:
        self.penalty.forget()
        for p in self._watched():
            if p.grad is not None:
                p.grad._of_fam_step = p.grad._version  # type: ignore[attr-defined]

    def _watched(self) -> Sequence[Tensor]:
        """The parameters whose gradients show what was backpropagated: the layers', if they are trained."""
        weights = [w for layer in self.penalty.layers for w in weights_of(layer) if w.requires_grad]
        trained = {id(p) for p in self._parameters()}
        own = [w for w in weights if id(w) in trained]
        return own or [p for p in self._parameters() if p.requires_grad]

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
        layers = ", ".join(name_of(layer) for layer in self.penalty.layers)
        mode = self.penalty.settings.mode
        return f"FAM(lam={self.lam}, mode={mode!r}, layer={layers}, base={self.base_optimizer})"

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


@partial(opaque, reason="fam_optim looks into the graph that the closure builds")
def _untraced(evaluate: Callable[[], Any]) -> Any:
    return evaluate()


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
