"""A closure as the base optimizer gets it: its losses are regularised before they are backpropagated.

The user's closure either returns the loss and leaves backward to FAM, or calls backward itself, on one
loss or several, scaled or not; a backward that it calls runs on the loss with its penalty. A base that reads
what a closure returns (LBFGS's line search, Polyak's step size) must find the function whose gradient it
gets, the user the plain loss.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from fam_optim.compilation import opaque
from fam_optim.graph import nodes
from fam_optim.graph.trace import LayerNotUsedError
from fam_optim.interception import BackwardInterception
from fam_optim.penalty import Penalty, is_regularized, made_of, penalties_in, without_penalties

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from torch.autograd.graph import Node

    from fam_optim.regularizer import Regularizer


class WatchedClosure:
    """The closure of one step, whose losses a regulariser sees before they are backpropagated.

    Args:
        closure: the user's.
        regularizer: what sees them.
        check: called after an evaluation: refuses gradients that no step may be made on.
        zero_grad: empties the gradients.
        trained: the base optimizer's parameters.

    Attributes:
        evaluations: how often the base has evaluated it.
        returned: what the user's closure returned first, without penalties.
    """

    def __init__(
        self,
        closure: Callable[[], Any],
        regularizer: Regularizer,
        *,
        check: Callable[[], None],
        zero_grad: Callable[[], None],
        trained: Callable[[], Iterable[Tensor]],
    ) -> None:
        if not callable(closure):
            raise TypeError(
                f"expected a closure, a function that returns the loss, got a {type(closure).__name__}. With "
                "a loss call optimizer.regularize(loss).backward() and optimizer.step()."
            )
        self.closure, self.regularizer, self.check, self.zero_grad = closure, regularizer, check, zero_grad
        self.trained = trained
        self.evaluations = 0
        self.returned: Any = None

    def __call__(self) -> Any:
        return _untraced(self._evaluate)

    def _evaluate(self) -> Any:
        self.evaluations += 1
        self._begin()
        before = [p.grad for p in self.trained()]
        with torch.enable_grad(), BackwardInterception(self._seen) as backward:
            result = self.closure()
        if backward.seen:
            self._check_seen()
        elif result is not None or not self._may_only_step():
            _check_returned(result)
            self._check_left(before)
            if self.evaluations > 1:  # the base tries again, from gradients that are still the last try's
                self.zero_grad()
            self._regularized(result).backward()  # type: ignore[no-untyped-call]  # seen from outside too
        self.check()
        return self._value(result)

    def _check_left(self, before: list[Tensor | None]) -> None:
        """Raises RuntimeError if the closure has made gradients without a backward that was seen."""
        pairs = zip((p.grad for p in self.trained()), before, strict=True)
        if any(g is not None and g is not old and bool(g.any()) for g, old in pairs):
            raise RuntimeError(
                "the closure assigned gradients and called no backward, and its loss would be backpropagated "
                "once more. Expected it to leave gradients alone, to call loss.backward(), or to take them "
                "of optimizer.regularize(loss) and return None."
            )

    def _may_only_step(self) -> bool:
        return self.regularizer.given or not self.regularizer.lam  # Lightning's manual optimisation

    def _begin(self) -> None:
        """Before an evaluation."""
        if self.evaluations > 1:  # from other weights
            self.regularizer.gradients_zeroed()

    def _regularized(self, loss: Tensor) -> Tensor:
        """What is backpropagated in place of a loss."""
        return self.regularizer.regularize(loss)

    def _seen(self, loss: Tensor) -> Tensor:
        """The same of a loss that the closure backpropagates."""
        return self._regularized(loss)

    def _check_seen(self) -> None:
        """Raises RuntimeError if the closure backpropagated nothing that could be regularised."""

    def _value(self, result: Any) -> Any:
        """What the base gets of what the closure returned."""
        if self.evaluations == 1:
            self.returned = result
        return result.detach() if isinstance(result, Tensor) else result


class PenalizedClosure(WatchedClosure):
    """The closure of one step whose losses are backpropagated with their penalty."""

    def __init__(self, closure: Callable[[], Any], penalty: Penalty, **functions: Any) -> None:
        super().__init__(closure, penalty, **functions)
        self.penalty = penalty
        self._missed: LayerNotUsedError | None = None

    def _begin(self) -> None:
        self._backwards: list[_Backward] = []
        self.penalty.touched = False

    def _check_seen(self) -> None:
        if self.penalty.lam and not self.penalty.touched:
            raise LayerNotUsedError(
                "no loss that was backpropagated in the closure depends on `layer` "
                f"{self.penalty.names}, so there is nothing to regularise. Expected the layer to be "
                "called, as a module, in the forward that made the loss."
            ) from self._missed
        if self.penalty.lam and self.penalty.ledger.is_empty():
            raise RuntimeError(
                "the closure called backward and left no gradients: they were zeroed after it, so that the "
                "loss that it returned would not be trained on. Expected zero_grad() before the backward, "
                "and every loss backpropagated in the closure, or none."
            )

    def _value(self, result: Any) -> Any:
        contained = self._contained(result)
        if self.evaluations == 1:
            self.returned = result if contained is None else without_penalties(result, contained)
        return self._objective(result, contained)

    def _seen(self, loss: Tensor) -> Tensor:
        """Another network's loss passes."""
        try:
            return self._regularized(loss)
        except LayerNotUsedError as error:
            self._missed = error.with_traceback(None)  # whose frames would keep the graph
            self.penalty.ledger.expect(loss)
            return loss

    def _regularized(self, loss: Tensor) -> Tensor:
        if not self.penalty.lam:
            return loss
        if not self._backwards:  # the others add to it rightly
            self.penalty.ledger.check()
        regularized = self.penalty.add(loss)
        # While there is a graph to ask. It is walked only if this penalty was somewhere in the loss.
        contained = penalties_in(loss) if regularized is loss or is_regularized(loss) else None
        self._backwards.append(_Backward(_factors(loss), regularized.detach(), loss.detach(), contained))
        return regularized

    def _contained(self, result: Any) -> Tensor | None:
        """The penalties in what the closure returned, if it returned a regularised loss."""
        if not isinstance(result, Tensor):
            return None
        for backward in self._backwards:  # whose graph is gone
            if backward.factors.get(result.grad_fn) == 1:
                return backward.contained
        return penalties_in(result)

    def _objective(self, result: Any, contained: Tensor | None) -> Any:
        """The value, in the unit of `result`, of what was backpropagated.

        kappa is linear in the loss: where the closure backpropagated a multiple of what it returned (a
        GradScaler's), the penalty is that multiple too, and so is `last_kappa`.
        """
        if not self._backwards or not isinstance(result, (Tensor, float)):
            return result.detach() if isinstance(result, Tensor) else result
        shares = [b.share_in(result) for b in self._backwards]
        if shares[-1] is not None:
            self.penalty.rescale(shares[-1])
        if len(shares) == 1 and self._backwards[0].factors.get(getattr(result, "grad_fn", None)) == 1:
            return self._backwards[0].objective  # the loss itself, as almost always
        if all(share is None for share in shares):  # a number, or detached: in the unit of the losses
            shares = [1.0] * len(shares)
        objective = result.detach() if isinstance(result, Tensor) else result
        for backward, share in zip(self._backwards, shares, strict=True):
            if share is not None:
                objective = objective + share * backward.penalties
        objective = objective if contained is None else objective - contained
        return float(objective) if isinstance(result, float) else objective


class _Backward(NamedTuple):
    """One backward of a closure's.

    Attributes:
        factors: the node of the loss that the closure backpropagated, and those of the scalars that it is a
            multiple of, with the factors.
        objective: the value of what was backpropagated in its place.
        loss: its own value.
        contained: the penalties that were in it already; None if there were none.
    """

    factors: dict[Node | None, Any]
    objective: Tensor
    loss: Tensor
    contained: Tensor | None

    @property
    def penalties(self) -> Tensor:
        """All penalties in what was backpropagated."""
        added = self.objective - self.loss
        return added if self.contained is None else added + self.contained

    def share_in(self, result: Any) -> Any:
        """How often `result` contains the loss; None if it was not made of it."""
        if not isinstance(result, Tensor):
            return None
        if result.grad_fn in self.factors:
            return 1 / self.factors[result.grad_fn]
        inside = next((node for node in made_of(result) if node in self.factors), None)
        return None if inside is None else _derivative(result, inside) / self.factors[inside]


def _factors(loss: Tensor) -> dict[Node | None, Any]:
    """The scalars that `loss` is a multiple of, by their nodes, and the factors."""
    factors: dict[Node | None, Any] = {loss.grad_fn: 1}
    node = loss.grad_fn
    while node is not None and nodes.kind(node) in ("Mul", "Div") and len(_operands(node)) == 1:
        (node,) = _operands(node)
        factors[node] = _derivative(loss, node)
    return factors


def _operands(node: Node) -> list[Node]:
    return [below for below, _ in node.next_functions if below is not None]


def _derivative(value: Tensor, scalar: Node) -> Tensor:
    edge = GradientEdge(scalar, 0)
    (derivative,) = torch.autograd.grad(value, edge, torch.ones_like(value), retain_graph=True)
    return derivative.reshape(())


def watched(closure: Callable[[], Any], regularizer: Regularizer, **functions: Any) -> WatchedClosure:
    """The user's closure as the base gets it."""
    if isinstance(regularizer, Penalty):
        return PenalizedClosure(closure, regularizer, **functions)
    return WatchedClosure(closure, regularizer, **functions)


@partial(opaque, reason="fam_optim looks into the graph that the closure builds")
def _untraced(evaluate: Callable[[], Any]) -> Any:
    return evaluate()


def _check_returned(result: Any) -> None:
    if not isinstance(result, Tensor) or result.grad_fn is None:
        raise RuntimeError(
            "expected the closure to return the loss as a tensor with its graph, or to call "
            f"loss.backward() itself; it called no backward and returned {result!r}. (In Lightning's manual "
            "optimisation, call self.manual_backward(optimizer.regularize(loss)) before optimizer.step().)"
        )
