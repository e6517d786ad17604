"""The penalty: ``lam * kappa`` of a loss, added once, whoever asks for it and however often."""

from __future__ import annotations

import math
import weakref
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from fam_optim.flatness import Settings, check_mode, tails_flatness
from fam_optim.layer import LayerUse, describe, parameter_use
from fam_optim.observation import Observation, metadata, parametrization, release
from fam_optim.tail import LayerNotUsedError, find_tail

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch.autograd.graph import Node

    from fam_optim.flatness import Layer
    from fam_optim.tail import Tail

_MARK = "fam_optim.regularized"


class _Mark(NamedTuple):
    """On the node of a regularised loss: the loss without penalties, and the penalties added to it."""

    plain: Tensor
    by: frozenset[int]


class Penalty:
    """``lam * kappa`` at some layers, and what happened to it since the last step.

    It is one object beside the optimizer, since trainers wrap optimizers in a class that inherits from
    theirs: methods and setters are then called with the wrapper for self, which reads the optimizer's
    attributes but writes its own (Lightning-AI/pytorch-lightning, core/optimizer.py).

    Attributes:
        layers: observations and parameters.
        last_kappa: kappa of the loss as it last entered the penalty, detached; None before.
        given: whether a regularised loss was handed out since the last step.
        touched: which layers, by number, a regularised loss depended on in this closure.
        missed: why a loss was passed on without a penalty, if one was.
    """

    missed: LayerNotUsedError | None

    def __init__(self, layer: Any, lam: float, settings: Settings) -> None:
        self.settings = settings
        self.lam = lam
        self.layers = as_layers(layer)
        for one in self.layers:
            check_mode(one, settings.mode)
        self.last_kappa: Tensor | None = None
        self._used: weakref.WeakSet[LayerUse] = weakref.WeakSet()
        self.touched: set[int] = set()
        self.forget()

    def start(self) -> None:
        """Observes the layers from now on."""
        for layer in self.layers:
            if isinstance(layer, Observation):
                layer.start()

    @property
    def lam(self) -> float:
        """Weight of kappa."""
        return self._lam

    @lam.setter
    def lam(self, value: float) -> None:
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"expected `lam` to be finite and at least 0, got {value!r}.")
        self._lam = float(value)

    def add(self, loss: Tensor) -> Tensor:
        """``loss + lam * kappa``; the loss itself if this penalty is in it already."""
        return self._add(loss, self._tails)

    def add_where_touched(self, loss: Tensor) -> Tensor:
        """As `add`, over the layers that the loss depends on: another network's loss passes."""
        return self._add(loss, self._tails_where_touched)

    def check_all_touched(self) -> None:
        """Raises LayerNotUsedError if no loss in the closure depended on one of the layers."""
        for number, layer in enumerate(self.layers):
            if number not in self.touched:
                raise LayerNotUsedError(
                    "no loss that was backpropagated in the closure depends on `layer` "
                    f"{name_of(layer)}, so there is nothing to regularise. Expected the layer to be called, "
                    "as a module, in the forward that made the loss."
                ) from self.missed

    def begin(self) -> None:
        """Before a closure is evaluated."""
        self.touched.clear()
        self.missed = None

    def forget(self) -> None:
        """After a step: drops what was recorded of its forwards, although the user may keep their losses."""
        for use in list(self._used):
            release(use)
        self._used.clear()
        self.begin()
        self.given = False

    def _tails(self, loss: Tensor) -> dict[int, Tail]:
        return {number: find_tail(loss, layer) for number, layer in enumerate(self.layers)}

    def _tails_where_touched(self, loss: Tensor) -> dict[int, Tail]:
        tails = {}
        for number, layer in enumerate(self.layers):
            try:
                tails[number] = find_tail(loss, layer)
            except LayerNotUsedError as error:
                self.missed = self.missed or error.with_traceback(None)  # whose frames would keep the graph
        return tails

    def _add(self, loss: Tensor, tails_of: Callable[[Tensor], dict[int, Tail]]) -> Tensor:
        plain, by = self._without_penalties(loss)
        if id(self) in by:
            self.touched.update(range(len(self.layers)))
            return loss
        tails = tails_of(plain)
        if not tails:
            return loss
        self.touched.update(tails)
        for tail in tails.values():
            self._used.update(use for use in tail.uses if isinstance(use, LayerUse))
        kappa = tails_flatness(list(tails.values()), self.settings)
        self.last_kappa = kappa.detach()
        regularized = torch.add(loss, kappa, alpha=self.lam)
        assert regularized.grad_fn is not None
        metadata(regularized.grad_fn)[_MARK] = _Mark(plain, by | {id(self)})
        return regularized

    def _without_penalties(self, loss: Tensor) -> _Mark:
        """The loss that kappa is to be computed of, and the penalties that are in it.

        Another optimizer's penalty is no part of the loss: kappa is that of the loss which it was given.

        Raises:
            RuntimeError: if the loss was changed since, and so cannot be told from the penalty.
        """
        marks = list(_marks(loss))
        if not marks:
            return _Mark(loss, frozenset())
        by = frozenset[int]().union(*(mark.by for _, mark in marks))
        if id(self) in by:
            return _Mark(loss, by)
        node, mark = marks[0]
        if node is loss.grad_fn:
            return mark
        raise RuntimeError(
            "the loss was changed after another FAM had regularised it, so its kappa cannot be told from the "
            "loss any more. Scale or add first and regularise last: "
            "second.regularize(first.regularize(loss / k))."
        )

    def __getstate__(self) -> dict[str, Any]:
        return {name: vars(self)[name] for name in ("settings", "_lam", "layers", "last_kappa")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._used = weakref.WeakSet()
        self.touched = set()
        self.forget()


def as_layers(layer: Any) -> tuple[Layer, ...]:
    """What the user named as `layer`: modules to be observed, and parameters.

    Raises:
        TypeError, ValueError: for anything else, nothing, or the same layer twice.
    """
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


def weights_of(layer: Layer) -> list[Tensor]:
    """The parameters behind a layer's weight: the weight itself, or what it is parametrised by."""
    if isinstance(layer, Tensor):
        return [layer]
    source = parametrization(layer.module)
    if source is not None:
        return list(source.parameters())
    own = layer.module._parameters
    if own.get("weight") is not None:
        return [cast("Tensor", own["weight"])]
    # Pruning and the older weight_norm and spectral_norm compute `weight` in a pre-hook, from weight_*.
    return [p for name, p in own.items() if p is not None and name.startswith("weight_")]


def name_of(layer: Layer) -> str:
    """The layer as the user knows it, for messages."""
    return describe(layer.module if isinstance(layer, Observation) else layer)


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
