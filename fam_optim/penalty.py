"""The penalty ``lam * kappa`` is added to a loss only once, no matter who asks for it and how often."""

import warnings
import weakref
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node
from torch.optim import Optimizer

from fam_optim import unnoticed
from fam_optim.flatness import Settings, check_mode, tails_flatness
from fam_optim.gradients import FiniteGuard, Ledger
from fam_optim.graph import nodes
from fam_optim.graph.reach import LayerNotUsedError, check_scalar, spread
from fam_optim.graph.trace import find_tails, uses_in
from fam_optim.layer.record import Observation
from fam_optim.layer.use import LayerUse, describe
from fam_optim.layers import as_layers, device_of, weights_of
from fam_optim.regularizer import Regularizer

_MARK = "fam_optim.regularized"


class _Mark(NamedTuple):
    """A note that is kept on the graph node of a regularised loss."""

    plain: Tensor  # the loss without penalties
    penalties: Mapping[object, Tensor]  # the added penalties, detached, by the key of their `Penalty`


class Penalty(Regularizer):
    """Adds ``lam * kappa`` of some layers to losses, and keeps track of these losses until the step."""

    _saved = ("settings", "lam", "layers", "last_kappa", "last_lam")

    def __init__(self, layer: Any, lam: float, settings: Settings) -> None:
        self.lam = lam
        self.layers = as_layers(layer)
        for one in self.layers:
            check_mode(one, settings)
        if settings.mode == "hutchinson" and settings.generator is None:  # do not advance torch's own
            generator = torch.Generator(device_of(self.layers)).manual_seed(torch.initial_seed())
            settings = replace(settings, generator=generator)
        self.settings = settings
        self._prepare()

    def _prepare(self) -> None:
        self._key = object()  # not id(self), which a later object may get while this one's marks still exist
        self._used: weakref.WeakSet[LayerUse] = weakref.WeakSet()
        self._larger: unnoticed.AsyncFlag | None = None  # on an accelerator: was the last penalty > loss
        self._warned = False
        self.after_step()

    def start(self, base: Optimizer) -> None:
        """Starts to observe the layers, and the gradients of their trained weights."""
        super().start(base)
        for layer in self.layers:
            if isinstance(layer, Observation):
                layer.start()
        alive = weakref.proxy(self)  # so that a FAM that is dropped is freed at once, with its hooks
        weights = [w for layer in self.layers for w in weights_of(layer)]
        self.ledger = Ledger(self.names, weights, lambda: alive.trained)
        self._guard = FiniteGuard(self.names)

    def named_weights(self) -> list[tuple[str, list[Tensor]]]:
        return [(describe(getattr(layer, "module", layer)), weights_of(layer)) for layer in self.layers]

    @partial(unnoticed.opaque, reason="fam_optim looks at the gradients")
    def check(self) -> None:
        if self.given and all(p.grad is None for p in self.trained):
            raise RuntimeError(
                f"a loss was regularised (`layer` {self.names}), and nothing that is trained has a gradient. "
                "No backward ran, or it left no gradients: they were zeroed after it. Expected zero_grad(), "
                "then regularize(loss).backward() before step(); in a closure, all losses backpropagated, or "
                "none."
            )
        self.ledger.check()
        self._guard.check(self.losses, self.trained)

    def state(self) -> dict[str, Any]:
        generator = self.settings.generator
        return {"lam": self.lam, "generator": None if generator is None else generator.get_state()}

    def load(self, state: dict[str, Any]) -> None:
        self.lam = state["lam"]
        if self.settings.generator is not None and state.get("generator") is not None:
            self.settings.generator.set_state(state["generator"].cpu())

    def __repr__(self) -> str:
        return f"mode={self.settings.mode!r}, lam={self.lam}, layer={self.names}"

    def after_step(self) -> None:
        # Releases what was recorded of the step's forwards, even if the user keeps their losses.
        for use in list(self._used):
            use.release(self.layers)
        self._used.clear()
        self.given = False
        self.losses: list[Tensor] = []  # those regularised since the last step, detached

    @partial(unnoticed.opaque, reason="fam_optim looks into the graph of the loss")
    @torch.inference_mode(False)  # which also turns gradients on, in a base that evaluates without them
    def regularize(self, loss: Tensor) -> Tensor:
        """Returns ``loss + lam * kappa``; the loss itself if lam is 0 or it contains this penalty already."""
        if not self.lam:
            return loss
        check_scalar(loss)
        mark = self._mark_to_extend(loss)
        if self._key in mark.penalties:
            return loss
        try:
            tails = list(find_tails(mark.plain, self.layers).values())
        except LayerNotUsedError:
            self.ledger.expect(loss)  # a closure may backpropagate it beside others
            raise
        self._used.update(use for tail in tails for use in tail.uses if isinstance(use, LayerUse))
        kappa = tails_flatness(tails, self.settings)
        self.last_kappa, self.last_lam = kappa.detach(), self.lam
        penalty = self.lam * self.last_kappa
        self._compare(penalty, mark.plain.detach())
        self.losses.append(mark.plain.detach())
        regularized = torch.add(loss, kappa, alpha=self.lam)
        assert regularized.grad_fn is not None
        penalties = {**mark.penalties, self._key: penalty}
        nodes.metadata(regularized.grad_fn)[_MARK] = _Mark(mark.plain, penalties)
        self.ledger.expect(regularized)
        return regularized

    def _mark_to_extend(self, loss: Tensor) -> _Mark:
        """Returns the loss to compute kappa of, and the penalties that `loss` contains. Another optimizer's
        penalty does not count as part of the loss: kappa is that of the plain loss."""
        marked = list(_marked(loss))
        if not marked:
            return _Mark(loss, {})
        node, mark = marked[0]
        if node is loss.grad_fn:
            return mark
        if not all(self._key in mark.penalties for _, mark in marked):
            raise RuntimeError(
                "the loss was changed after another FAM had regularised it, so its kappa cannot be told from "
                "it. Scale or add first and regularise last: second.regularize(first.regularize(loss / k))."
            )
        if any(uses_in(_made_of(loss), self.layers)):  # beside the regularised losses
            raise RuntimeError(
                f"part of the loss that depends on `layer` {self.names} was regularised already, and part of "
                "it was not. Regularise every loss, or add them first: optimizer.regularize(a + b)."
            )
        return mark

    def plain(self, loss: Tensor) -> Tensor:
        """Returns a loss without the penalties in it, whatever was done to regularised losses since."""
        marked = _marked(loss)
        if not marked:
            return loss
        node, mark = marked[0]
        if node is loss.grad_fn:
            return mark.plain
        edges = [GradientEdge(node, 0) for node, _ in marked]
        try:
            shares = torch.autograd.grad(loss, edges, torch.ones_like(loss), retain_graph=True)
        except RuntimeError as error:
            raise RuntimeError(
                "the closure returned a loss that contains lam * kappa and was backpropagated already, so "
                "the two cannot be told apart. Expected it to return the plain loss."
            ) from error
        sums = [torch.stack(list(mark.penalties.values())).sum() for _, mark in marked]
        inside = [share.reshape(()) * s for share, s in zip(shares, sums, strict=True)]
        return loss.detach() - torch.stack(inside).sum()

    def _compare(self, penalty: Tensor, loss: Tensor) -> None:
        """Warns once if the penalty is larger than the loss; on an accelerator it does so a step later."""
        if self._warned:
            return
        larger: unnoticed.AsyncFlag | None = unnoticed.AsyncFlag(penalty > loss.abs().reshape(()))
        if unnoticed.reading_waits(penalty):
            larger, self._larger = self._larger, larger
        if larger is not None and larger.read():
            self._warned = True
            warnings.warn(
                f"lam * kappa of `layer` {self.names} is larger than the loss itself: the network is trained "
                "to be flat before it is trained to fit. Try a smaller lam, such as a tenth.",
                stacklevel=2,
            )


def _marked(loss: Tensor) -> list[tuple[Node, _Mark]]:
    """Returns the nodes of the regularised losses that `loss` was made of, with their marks."""
    return [(node, nodes.metadata(node)[_MARK]) for node in _made_of(loss) if _MARK in nodes.metadata(node)]


def _made_of(loss: Tensor) -> list[Node]:
    """Returns the graph nodes of `loss`, its own first, except those below regularised losses."""

    def below(node: Node) -> list[Node]:
        return [] if _MARK in nodes.metadata(node) else [n for n, _ in node.next_functions if n is not None]

    root = [] if loss.grad_fn is None else [loss.grad_fn]
    return root + sorted(spread(root, below), key=nodes.sequence_number)
