"""Checks the arguments of FAM, and builds the base optimizer and the regulariser from them."""

import math
import warnings
from numbers import Real
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from fam_optim.flatness import Settings
from fam_optim.layers import several
from fam_optim.penalty import Penalty
from fam_optim.proximal import Proximal
from fam_optim.regularizer import Regularizer
from fam_optim.wrapper import OptimizerWrapper

LAM, LAM_OF_A_PENALTY, EVERY = 1.0, 8e-3, 10
OF_PENALTY = ("measure", "curvature", "normalize", "detach_hessian")


def build_regularizer(
    layer: Any, lam: float | None, mode: str, every: Any, of_penalty: Any, n_samples: int, generator: Any
) -> Regularizer:
    """Builds the regulariser of a mode. `of_penalty` has the values of `OF_PENALTY`, None where not given."""
    default = LAM if mode == "proximal" else LAM_OF_A_PENALTY
    lam = checked_lam(default if lam is None else lam)
    given = {n: value for n, value in zip(OF_PENALTY, of_penalty, strict=True) if value is not None}
    random = {"n_samples": n_samples, "generator": generator}
    if mode != "proximal":
        if every is not None:
            raise ValueError(f"expected `every` with mode='proximal' alone, got mode={mode!r}. Leave it out.")
        return Penalty(layer, lam, Settings(mode=mode, **given, **random))
    meaningless = {name: value for name, value in given.items() if value != "gauss_newton"}
    if meaningless:
        listed = ", ".join(f"{name}={value!r}" for name, value in meaningless.items())
        raise ValueError(
            f"got {listed} with mode='proximal', which is neuronwise, with Gauss-Newton curvature that is "
            "held constant, and has no unit. Leave that out, or use mode='hutchinson'."
        )
    Settings(**random)  # only to check them
    every = EVERY if every is None else every
    if not isinstance(every, int) or every < 1:
        raise ValueError(f"expected `every` to be a positive integer, got {every!r}.")
    return Proximal(several(layer), lam, every, **random)


def checked_lam(lam: Any) -> float:
    """Returns `lam` as a float; ValueError unless it is finite and at least 0."""
    number = float(lam) if isinstance(lam, (Real, Tensor)) else math.nan
    if not (math.isfinite(number) and number >= 0):
        raise ValueError(f"expected `lam` to be finite and at least 0, got {lam!r}.")
    return number


def build_base(base_optimizer: Any, params: Any, base_kwargs: dict[str, Any]) -> Optimizer:
    """Builds the base optimizer; TypeError if what was given does not make one."""
    built = isinstance(base_optimizer, Optimizer)
    if built or not callable(base_optimizer):
        kind = type(base_optimizer).__name__ if built else "SGD"
        got = f"an instance of {kind}" if built else repr(base_optimizer)
        raise TypeError(
            "expected `base_optimizer` to be a class or callable (params, **kwargs) -> Optimizer, got "
            f"{got}. Pass the class and its arguments: FAM(params, {kind}, layer, lr=...)."
        )
    base = base_optimizer(params, **base_kwargs)
    if not isinstance(base, Optimizer) or isinstance(base, OptimizerWrapper):
        raise TypeError(
            f"expected `base_optimizer` to make a plain torch.optim.Optimizer, got a {type(base).__name__} "
            f"from {base_optimizer!r}. (One FAM keeps several layers flat: layer=[...].)"
        )
    return base


def warn_untrained(regularizer: Regularizer) -> None:
    """Warns if some layers have weights that are neither frozen nor among the trained parameters."""
    trained = {id(p) for p in regularizer.trained}
    left_out = [
        name
        for name, weights in regularizer.named_weights()
        if any(w.requires_grad for w in weights) and not any(id(w) in trained for w in weights)
    ]
    if left_out:
        warnings.warn(
            f"weights are not among the parameters given to FAM, of `layer` {', '.join(left_out)}: they are "
            "not trained. Add them to `params`, or leave them out of `layer`.",
            stacklevel=3,
        )
