"""Checks the arguments of FAM, and builds the base optimizer and the regulariser from them."""

import math
import warnings
from numbers import Real
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from fam_optim.flatness import Settings
from fam_optim.penalty import Penalty
from fam_optim.proximal import Proximal
from fam_optim.regularizer import Regularizer
from fam_optim.wrapper import OptimizerWrapper

LAM, LAM_OF_A_PENALTY, EVERY = 1.0, 8e-3, 10


def build_regularizer(
    layer: Any, lam: float | None, mode: str, every: int | None, of_penalty: dict[str, Any], **random: Any
) -> Regularizer:
    """Builds the regulariser of a mode; ValueError if an argument means nothing in it. `of_penalty` has
    measure, curvature, normalize and detach_hessian, None if not given; `random` n_samples and generator."""
    if lam is None:
        lam = LAM if mode == "proximal" else LAM_OF_A_PENALTY
    lam = checked_lam(lam)
    given = {name: value for name, value in of_penalty.items() if value is not None}
    if mode != "proximal":
        if every is not None:
            raise ValueError(
                f"expected `every` with mode='proximal' alone, got it with mode={mode!r}, whose penalty is "
                "in every step. Leave it out."
            )
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
    layers = layer if isinstance(layer, (list, tuple)) else (layer,)
    if not layers:
        raise ValueError(
            "expected `layer` to name at least one layer, got an empty sequence: of a model with one weight "
            "layer weight_layers(model)[:-1] is empty. Name the layer."
        )
    return Proximal(layers, lam, every, **random)


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
        raise TypeError(
            "expected `base_optimizer` to be a class or callable (params, **kwargs) -> Optimizer, got "
            f"{f'an instance of {kind}' if built else repr(base_optimizer)}. Pass the class and its "
            f"arguments: FAM(params, {kind}, layer, lr=...)."
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
            "not trained (as a penalty their kappa still regularises the others). Add them to `params`, "
            "or leave them out of `layer`.",
            stacklevel=3,
        )
