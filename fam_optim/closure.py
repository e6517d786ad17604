"""A closure as the base optimizer gets it: backpropagates ``loss + lam * kappa`` and returns its value.

The user's closure either returns the loss and leaves backward to FAM, or calls backward itself, on one
loss or several, scaled or not; a backward that it calls runs on the loss with its penalty. A base that reads
what a closure returns (LBFGS's line search, Polyak's step size) must find the function whose gradient it
gets, the user the plain loss.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from fam_optim.compilation import opaque
from fam_optim.graph import nodes
from fam_optim.interception import BackwardInterception
from fam_optim.penalty import penalties_in, scalars_below, without_penalties

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch.autograd.graph import Node

    from fam_optim.penalty import Penalty
    from fam_optim.proximal import Proximal


class RegularizedClosure:
    """The closure of one step.

    Args:
        closure: the user's.
        penalty: what is added to losses.
        before: called before the first backward of an evaluation: refuses gradients that FAM did not see.
        after: called after an evaluation: refuses gradients that no step may be made on.
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
        before: Callable[[], None],
        after: Callable[[], None],
        zero_grad: Callable[[], None],
    ) -> None:
        self.closure, self.penalty = closure, penalty
        self.zero_grad, self.before, self.after = zero_grad, before, after
        # What gradients there are, are in order: of regularize(), or of the plain loss if that is all.
        self.accumulates = penalty.given or not penalty.lam
        self.evaluations = 0
        self.returned: Any = None

    def __call__(self) -> Any:
        return _untraced(self._evaluate)

    def _evaluate(self) -> Any:
        self.evaluations += 1
        self._looked = self.accumulates
        self._backwards: list[_Backward] = []
        self.penalty.begin()
        with torch.enable_grad(), BackwardInterception(self._regularize) as backward:
            result = self.closure()
        only_steps = result is None and self.accumulates  # Lightning's manual optimisation
        if backward.seen:
            if self.penalty.lam:
                self.penalty.check_all_touched()
                self._unscale_last_kappa(result)
        elif not only_steps:
            self._backpropagate(result)
        self.after()
        contained = self._contained(result)
        if self.evaluations == 1:
            self.returned = result if contained is None else without_penalties(result, contained)
        return self._objective(result, contained)

    def _regularize(self, loss: Tensor) -> Tensor:
        """What a backward of the closure's runs on, in place of `loss`."""
        self._look()
        return self._with_penalty(loss, self.penalty.add_where_touched)

    def _with_penalty(self, loss: Tensor, add: Callable[[Tensor], Tensor]) -> Tensor:
        if not self.penalty.lam:
            return loss
        regularized = add(loss)
        backward = _Backward(loss, regularized)
        if backward.penalised:
            self._backwards.append(backward)
        return regularized

    def _backpropagate(self, result: Any) -> None:
        """The backward that the closure left to FAM."""
        if self.evaluations > 1:  # the base tries again, from gradients that are still the last try's
            self.zero_grad()
        _check_returned(result)
        self._look()
        loss = self._with_penalty(result, self.penalty.add)
        loss.backward()  # type: ignore[no-untyped-call]  # seen from outside too

    def _look(self) -> None:
        """Before the first backward, whatever of: the others add to it rightly."""
        if not self._looked:
            self.before()
            self._looked = True

    def _unscale_last_kappa(self, result: Any) -> None:
        """Makes `last_kappa` that of the loss which the closure returned, where it backpropagated a multiple
        of it (a GradScaler's): whoever logs the two sees them in one unit."""
        node = result.grad_fn if isinstance(result, Tensor) else None
        if node is not None and self._backwards and self.penalty.last_kappa is not None:
            factor = self._backwards[-1].factors.get(node)
            if factor is not None:
                self.penalty.last_kappa = self.penalty.last_kappa / factor

    def _contained(self, result: Any) -> Tensor | None:
        """The penalties in what the closure returned, if it returned a regularised loss."""
        for backward in self._backwards:  # whose graph is gone
            if not backward.new and isinstance(result, Tensor) and backward.node is result.grad_fn:
                return backward.added
        return penalties_in(result)

    def _objective(self, result: Any, contained: Tensor | None) -> Any:
        """`result` with the penalties of the losses that it was made of, in its unit; with all that were
        backpropagated if it was made of none (a number, detached)."""
        if not self._backwards or not isinstance(result, (Tensor, float)):
            return result.detach() if isinstance(result, Tensor) else result
        (first, *others) = self._backwards
        if not others and isinstance(result, Tensor) and result.grad_fn is first.node:
            return first.objective  # the loss itself, as almost always
        shares = [share for b in self._backwards if (share := b.share_of(result)) is not None]
        penalties: Any = sum(shares or [b.added for b in self._backwards])
        if isinstance(result, float):
            return result + float(penalties)
        return result.detach() + penalties - (0 if contained is None else contained)


class SeenClosure:
    """The closure of one proximal step: shows every loss that is backpropagated to `proximal`.

    Args:
        closure: the user's.
        proximal: what takes A of a loss before its backward.
        zero_grad: empties the gradients.

    Attributes:
        evaluations: how often the base has evaluated it.
        returned: what the user's closure returned first.
    """

    def __init__(self, closure: Callable[[], Any], proximal: Proximal, zero_grad: Callable[[], None]) -> None:
        self.closure, self.proximal, self.zero_grad = closure, proximal, zero_grad
        self.evaluations = 0
        self.returned: Any = None

    def __call__(self) -> Any:
        return _untraced(self._evaluate)

    def _evaluate(self) -> Any:
        self.evaluations += 1
        if self.evaluations > 1:  # the base tries again, from other weights
            self.proximal.forget_backpropagated()
        with torch.enable_grad(), BackwardInterception(self._see) as backward:
            result = self.closure()
            only_steps = result is None and self.proximal.given  # Lightning's manual optimisation
            if not backward.seen and not only_steps:
                _check_returned(result)
                if self.evaluations > 1:
                    self.zero_grad()
                result.backward()
        if self.proximal.due:
            self.proximal.check()
        if self.evaluations == 1:
            self.returned = result
        return result.detach() if isinstance(result, Tensor) else result

    def _see(self, loss: Tensor) -> Tensor:
        self.proximal.see(loss)
        return loss


class _Backward:
    """One backward of a closure's.

    Args:
        loss: what the closure backpropagated.
        regularized: what was backpropagated in its place.

    Attributes:
        node: of the loss.
        factors: the scalars that the loss was a multiple of, by their nodes, and the factors.
        objective: the value of what was backpropagated.
        new: whether it has a penalty that the loss did not have.
        penalised: whether it has any.
    """

    def __init__(self, loss: Tensor, regularized: Tensor) -> None:
        self.node = loss.grad_fn
        self.new = regularized is not loss
        self.factors = _factors(loss)
        self.objective = regularized.detach()
        self._regularized = regularized
        self._added = None if self.new else penalties_in(loss)  # while there is a graph to ask
        self.penalised = self.new or self._added is not None

    @property
    def added(self) -> Tensor:
        """All penalties in what was backpropagated."""
        return cast("Tensor", penalties_in(self._regularized) if self.new else self._added)

    def share_of(self, result: Any) -> Tensor | None:
        """`added`, as it belongs to the part that this loss has in `result`; None if it has none."""
        if not isinstance(result, Tensor) or result.grad_fn is None:
            return None
        if result.grad_fn is self.node:
            return self.added
        if result.grad_fn in self.factors:
            return self.added / self.factors[result.grad_fn]
        for node in scalars_below(result):
            if node is self.node or node in self.factors:
                (part,) = torch.autograd.grad(result, GradientEdge(node, 0), retain_graph=True)
                return self.added * part.reshape(()) / self.factors.get(node, 1.0)
        return None


@partial(opaque, reason="fam_optim looks into the graph that the closure builds")
def _untraced(evaluate: Callable[[], Any]) -> Any:
    return evaluate()


def _factors(loss: Tensor) -> dict[Node, Tensor]:
    """The scalars that `loss` is a multiple of, by their nodes, and the factors."""
    factors: dict[Node, Tensor] = {}
    node = loss.grad_fn
    while node is not None and nodes.kind(node) in ("Mul", "Div"):
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
