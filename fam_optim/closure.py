"""A closure as the base optimizer gets it: backpropagates ``loss + lam * kappa`` and returns its value.

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
    from collections.abc import Callable

    from torch.autograd.graph import Node

    from fam_optim.proximal import Proximal


class RegularizedClosure:
    """The closure of one step.

    Args:
        closure: the user's.
        penalty: what is added to losses.
        check: called after an evaluation: refuses gradients that no step may be made on.
        zero_grad: empties the gradients.

    Attributes:
        evaluations: how often the base has evaluated it.
        returned: what the user's closure returned first, without penalties.
    """

    def __init__(
        self,
        closure: Callable[[], Any],
        penalty: Penalty,
        *,
        check: Callable[[], None],
        zero_grad: Callable[[], None],
    ) -> None:
        self.closure, self.penalty, self.check, self.zero_grad = closure, penalty, check, zero_grad
        self.evaluations = 0
        self.returned: Any = None
        self._missed: LayerNotUsedError | None = None

    def __call__(self) -> Any:
        return _untraced(self._evaluate)

    def _evaluate(self) -> Any:
        self.evaluations += 1
        self._backwards: list[_Backward] = []
        self.penalty.touched = False
        with torch.enable_grad(), BackwardInterception(self._regularize) as backward:
            result = self.closure()
        if backward.seen:
            if self.penalty.lam and not self.penalty.touched:
                raise LayerNotUsedError(
                    "no loss that was backpropagated in the closure depends on `layer` "
                    f"{self.penalty.names}, so there is nothing to regularise. Expected the layer to be "
                    "called, as a module, in the forward that made the loss."
                ) from self._missed
        elif result is not None or not self._may_only_step():
            self._backpropagate(result)
        self.check()
        contained = self._contained(result)
        if self.evaluations == 1:
            self.returned = result if contained is None else without_penalties(result, contained)
        return self._objective(result, contained)

    def _may_only_step(self) -> bool:
        return self.penalty.given or not self.penalty.lam  # Lightning's manual optimisation

    def _regularize(self, loss: Tensor) -> Tensor:
        """What a backward of the closure's runs on, in place of `loss`: another network's loss passes."""
        try:
            return self._with_penalty(loss)
        except LayerNotUsedError as error:
            self._missed = error.with_traceback(None)  # whose frames would keep the graph
            self.penalty.ledger.expect(loss)
            return loss

    def _backpropagate(self, result: Any) -> None:
        """The backward that the closure left to FAM."""
        if self.evaluations > 1:  # the base tries again, from gradients that are still the last try's
            self.zero_grad()
        _check_returned(result)
        self._with_penalty(result).backward()  # type: ignore[no-untyped-call]  # seen from outside too

    def _with_penalty(self, loss: Tensor) -> Tensor:
        if not self.penalty.lam:
            return loss
        if not self._backwards:  # the others add to it rightly
            self.penalty.ledger.check(self.penalty.names)
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


class SeenClosure:
    """The closure of one step whose losses are backpropagated as they are, once `proximal` has seen them.

    Args, Attributes: those of `RegularizedClosure`.
    """

    def __init__(
        self,
        closure: Callable[[], Any],
        proximal: Proximal,
        *,
        check: Callable[[], None],
        zero_grad: Callable[[], None],
    ) -> None:
        self.closure, self.proximal, self.check, self.zero_grad = closure, proximal, check, zero_grad
        self.evaluations = 0
        self.returned: Any = None

    def __call__(self) -> Any:
        return _untraced(self._evaluate)

    def _evaluate(self) -> Any:
        self.evaluations += 1
        if self.evaluations > 1:  # the base tries again, from other weights
            self.proximal.gradients_zeroed()
        with torch.enable_grad(), BackwardInterception(self.proximal.regularize) as backward:
            result = self.closure()
            only_steps = result is None and self.proximal.given  # Lightning's manual optimisation
            if not backward.seen and not only_steps:
                _check_returned(result)
                if self.evaluations > 1:
                    self.zero_grad()
                result.backward()
        self.check()
        if self.evaluations == 1:
            self.returned = result
        return result.detach() if isinstance(result, Tensor) else result


def watched(
    closure: Callable[[], Any],
    regularizer: Penalty | Proximal,
    *,
    check: Callable[[], None],
    zero_grad: Callable[[], None],
) -> RegularizedClosure | SeenClosure:
    """The user's closure as the base gets it, of either regulariser."""
    if isinstance(regularizer, Penalty):
        return RegularizedClosure(closure, regularizer, check=check, zero_grad=zero_grad)
    return SeenClosure(closure, regularizer, check=check, zero_grad=zero_grad)


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
