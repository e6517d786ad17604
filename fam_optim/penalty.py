"""The penalty: ``lam * kappa`` of a loss, added once, whoever asks for it and however often."""

from __future__ import annotations

import itertools
import math
import weakref
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from fam_optim.flatness import Settings, check_mode, tails_flatness
from fam_optim.graph import nodes
from fam_optim.graph.trace import LayerNotUsedError, find_tails
from fam_optim.layer.record import Observation, release
from fam_optim.layer.use import LayerUse
from fam_optim.layers import as_layers, name_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from torch.autograd.graph import Node

    from fam_optim.graph.trace import Tail

_MARK = "fam_optim.regularized"
_serial_numbers = itertools.count()


class _Mark(NamedTuple):
    """On the node of a regularised loss: the loss without penalties, and the penalties added to it, as
    ``lam, kappa`` by the serial number of who added them."""

    plain: Tensor
    penalties: Mapping[int, tuple[float, Tensor]]

    def total(self) -> Tensor:
        """All penalties, detached."""
        first, *others = (lam * kappa for lam, kappa in self.penalties.values())
        return sum(others, first)


class Penalty:
    """``lam * kappa`` at some layers, and what happened to it since the last step.

    It is one object beside the optimizer, since trainers wrap optimizers in a class that inherits from
    theirs: methods and setters are then called with the wrapper for self, which reads the optimizer's
    attributes but writes its own (Lightning-AI/pytorch-lightning, core/optimizer.py).

    Attributes:
        layers: observations and parameters.
        last_kappa: kappa of the loss as it last entered the penalty, detached; None before.
        given: whether a regularised loss was handed out since the last step.
        losses: the losses regularised since the last step, detached.
        touched: which layers, by number, a regularised loss depended on in this closure.
        missed: why a loss was passed on without a penalty, if one was.
    """

    missed: LayerNotUsedError | None

    def __init__(self, layer: Any, lam: float, settings: Settings) -> None:
        self.settings = settings
        self.lam = lam
        self.layers = as_layers(layer)
        for one in self.layers:
            check_mode(one, settings)
        self.last_kappa: Tensor | None = None
        self._prepare()

    def _prepare(self) -> None:
        """What a new, copied or unpickled penalty needs beside its arguments."""
        # Not the identity, which a later object may have again while this one's marks are still about.
        self._serial = next(_serial_numbers)
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

    @property
    def names(self) -> str:
        """The layers, for messages."""
        return ", ".join(name_of(layer) for layer in self.layers)

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
        self.losses: list[Tensor] = []

    def _tails(self, loss: Tensor) -> dict[int, Tail]:
        return {n: tail for n, tail in enumerate(find_tails(loss, self.layers)) if tail is not None}

    def _tails_where_touched(self, loss: Tensor) -> dict[int, Tail]:
        try:
            return self._tails(loss)
        except LayerNotUsedError as error:
            self.missed = self.missed or error.with_traceback(None)  # whose frames would keep the graph
            return {}

    def _add(self, loss: Tensor, tails_of: Callable[[Tensor], dict[int, Tail]]) -> Tensor:
        mark = self._mark_to_extend(loss)
        if self._serial in mark.penalties:
            self.touched.update(range(len(self.layers)))
            return loss
        tails = tails_of(mark.plain)
        if not tails:
            return loss
        self.touched.update(tails)
        for tail in tails.values():
            self._used.update(use for use in tail.uses if isinstance(use, LayerUse))
        kappa = tails_flatness(list(tails.values()), self.settings)
        self.last_kappa = kappa.detach()
        self.losses.append(mark.plain.detach())
        regularized = torch.add(loss, kappa, alpha=self.lam)
        assert regularized.grad_fn is not None
        penalties = {**mark.penalties, self._serial: (self.lam, self.last_kappa)}
        nodes.metadata(regularized.grad_fn)[_MARK] = _Mark(mark.plain, penalties)
        return regularized

    def _mark_to_extend(self, loss: Tensor) -> _Mark:
        """The loss that kappa is to be computed of, and the penalties that are in it.

        Another optimizer's penalty is no part of the loss: kappa is that of the loss which it was given.

        Raises:
            RuntimeError: if the loss was changed since, and so cannot be told from the penalty.
        """
        marks = list(_marks(loss))
        if not marks:
            return _Mark(loss, {})
        for _, mark in marks:
            if self._serial in mark.penalties:
                return mark
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
        self._prepare()


def penalties_in(loss: Any) -> Tensor | None:
    """The penalties in a regularised loss, whatever it was scaled by and added to since; None if it has none.

    Raises:
        RuntimeError: if that cannot be told, since the graph has been freed by a backward.
    """
    marks = list(_marks(loss))
    if not marks:
        return None
    if marks[0][0] is loss.grad_fn:
        return marks[0][1].total()
    edges = [GradientEdge(node, 0) for node, _ in marks]
    try:
        factors = torch.autograd.grad(loss, edges, torch.ones_like(loss), retain_graph=True)
    except RuntimeError as error:
        raise RuntimeError(
            "the closure returned a loss that contains lam * kappa and was backpropagated already, so the "
            "two cannot be told apart. Expected it to return the plain loss."
        ) from error
    return torch.stack([f * mark.total() for f, (_, mark) in zip(factors, marks, strict=True)]).sum()


def without_penalties(loss: Tensor, penalties: Tensor) -> Tensor:
    """A regularised loss as it was before, `penalties` being those in it."""
    marked = next(_marks(loss), None)
    if marked is not None and marked[0] is loss.grad_fn:
        return marked[1].plain
    return loss.detach() - penalties


def scalars_below(loss: Any) -> Iterator[Node]:
    """The nodes of single numbers that `loss` was made of by arithmetic on such, its own first; nothing below
    a loss that was regularised."""
    stack = [loss.grad_fn] if isinstance(loss, Tensor) else []
    seen = set(stack)
    while stack:
        node = stack.pop()
        if node is None or not nodes.is_scalar(node):
            continue
        yield node
        if _MARK in nodes.metadata(node):
            continue
        below = {n for n, _ in node.next_functions} - seen
        seen |= below
        stack.extend(below)


def _marks(loss: Any) -> Iterator[tuple[Node, _Mark]]:
    """The regularised losses that `loss` was made of, with their marks."""
    for node in scalars_below(loss):
        mark = nodes.metadata(node).get(_MARK)
        if mark is not None:
            yield node, mark
