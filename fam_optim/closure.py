"""The base optimizer gets the user's closure in a wrapper that regularises losses before their backward.

The user's closure may leave backward to FAM, or call it itself, on one loss or several, scaled or not. While
it runs, `torch.autograd.backward`, which every ``Tensor.backward`` calls, is replaced, so that the loss can
be changed. (A TorchFunctionMode would only see ``Tensor.backward``, and costs a microsecond per operation.) A
base that reads what the closure returns (LBFGS's line search, Polyak's step size) must get the function whose
gradient it gets. The user must get the plain loss.
"""

import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node
from torch.utils.weak import TensorWeakRef

from fam_optim.graph.reach import LayerNotUsedError
from fam_optim.unnoticed import opaque
from fam_optim.wrapper import OptimizerWrapper


class WatchedClosure:
    """The closure of one step; its losses are regularised before they are backpropagated.

    Args:
        check: called after each evaluation; raises if no step may be made on the gradients.
        may_skip: whether it may return None without gradients, as Lightning's closures do to skip a batch.

    Attributes:
        evaluations: how often the base has evaluated the closure.
        returned: what the user's closure returned at its first evaluation, without penalties.
    """

    def __init__(
        self, closure: Any, optimizer: OptimizerWrapper, check: Callable[[], None], may_skip: bool
    ) -> None:
        if not callable(closure):
            raise TypeError(
                f"expected a closure, a function that returns the loss, got a {type(closure).__name__}. With "
                "a loss call optimizer.regularize(loss).backward() and optimizer.step()."
            )
        self.closure, self.optimizer, self.regularizer = closure, optimizer, optimizer.regularizer
        self.check, self.may_skip = check, may_skip
        self.evaluations = 0
        self.returned: Any = None
        self._missed: LayerNotUsedError | None = None

    @partial(opaque, reason="fam_optim looks into the graph that the closure builds")
    def __call__(self) -> Any:
        self.evaluations += 1
        self._called_backward = False
        # Of each backward with a penalty: the loss's node, the loss without penalties, the value with them.
        self._backwards: list[tuple[Node | None, Tensor, Tensor]] = []
        trained = self.regularizer.trained if self.regularizer.looks else ()
        # Weak references, so that the closure can free these gradients.
        before = [(p, p.grad if p.grad is None else TensorWeakRef(p.grad)) for p in trained]
        with torch.enable_grad(), intercepted(self._seen):
            result = self.closure()
        if self._called_backward:
            if self._missed is not None and not self._backwards:
                raise LayerNotUsedError(
                    "no loss that was backpropagated in the closure depends on `layer` "
                    f"{self.regularizer.names}, so there is nothing to regularise. Expected the layer to be "
                    "called, as a module, in the forward that made the loss."
                ) from self._missed
        elif result is not None or (self.regularizer.lam and not (self.regularizer.given or self._skips())):
            # Any other closure has regularised before, as in Lightning's manual optimisation, and only steps.
            self._check_unseen(result, before)
            if self.evaluations > 1:  # the base tries again, and the last try's gradients are still there
                self.optimizer.zero_grad()
            self._regularized(result).backward()  # type: ignore[no-untyped-call]  # outer closures see it
        self.check()
        plain, value = self._values(result)
        if self.evaluations == 1:
            self.returned = plain
        return value

    def _skips(self) -> bool:
        """Returns whether a closure that returned None may have done so to skip a batch."""
        return self.may_skip and all(p.grad is None for p in self.regularizer.trained)

    def _check_unseen(self, result: Any, before: list[tuple[Tensor, TensorWeakRef | None]]) -> None:
        """Raises RuntimeError if a closure without a backward returned no loss, or assigned gradients."""
        if not isinstance(result, Tensor) or result.grad_fn is None:
            raise RuntimeError(
                "expected the closure to return the loss as a tensor with its graph, or to call "
                f"loss.backward(); it called no backward and returned {result!r}. (In Lightning's manual "
                "optimisation call self.manual_backward(optimizer.regularize(loss)) before optimizer.step().)"
            )
        made = (p.grad for p, old in before if p.grad is not None and p.grad is not (old and old()))
        if any(bool(g.any()) for g in made):
            raise RuntimeError(
                "the closure assigned gradients, and its loss would be backpropagated once more. Leave "
                "gradients alone, call loss.backward(), or take those of regularize(loss) and return None."
            )

    def _seen(self, loss: Tensor) -> Tensor:
        """Returns what to backpropagate in place of a loss: the loss itself if it depends on no layer."""
        self._called_backward = self.regularizer.given = True
        try:
            return self._regularized(loss)
        except LayerNotUsedError as error:
            self._missed = error.with_traceback(None)  # frames in a traceback would keep the graph alive
            return loss

    def _regularized(self, loss: Tensor) -> Tensor:
        if not self.regularizer.lam:
            return loss
        regularized = self.regularizer.regularize(loss)
        plain = self.regularizer.plain(regularized)  # now, since a backward frees the graph
        if plain is not regularized:
            self._backwards.append((loss.grad_fn, plain, regularized.detach()))
        return regularized

    def _values(self, result: Any) -> tuple[Any, Any]:
        """Returns what the user gets in place of what the closure returned, the plain loss, and what the base
        gets, the value of what was backpropagated. If that was a multiple of what the closure returned (with
        a GradScaler, say), so are the penalties and `last_kappa`, and it is divided out here."""
        plain, value = result, result
        if isinstance(result, Tensor):
            known = {node: loss for node, loss, _ in self._backwards}  # their graph is gone
            plain = known[result.grad_fn] if result.grad_fn in known else self.regularizer.plain(result)
            value = result.detach()
        if not self._backwards or not isinstance(result, (Tensor, float)):
            return plain, value
        nodes, plains, objectives = zip(*self._backwards, strict=True)
        if nodes == (getattr(result, "grad_fn", None),):
            return plain, objectives[0]  # the usual case: the closure returned this very loss
        backpropagated = torch.stack([loss.detach().reshape(()) for loss in plains]).sum()
        objective = torch.stack([loss.reshape(()) for loss in objectives]).sum()
        value = plain.detach() if isinstance(plain, Tensor) else plain
        unit = torch.where(backpropagated == 0, 1, value / backpropagated)
        if self.regularizer.last_kappa is not None:
            self.regularizer.last_kappa = self.regularizer.last_kappa * unit
        value = value + unit * (objective - backpropagated)
        return plain, float(value) if isinstance(result, float) else value


_transforms: dict[int, list[Callable[[Tensor], Tensor]]] = defaultdict(list)  # by thread, innermost last
_lock = threading.Lock()
_entered = 0
_torchs_own: Any = None


@contextmanager
def intercepted(transform: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """A context in which each backward that this thread calls backpropagates ``transform(loss)``."""
    global _entered, _torchs_own
    with _lock:
        if not _entered:
            _torchs_own, torch.autograd.backward = torch.autograd.backward, _backward
        _entered += 1
    _transforms[threading.get_ident()].append(transform)
    try:
        yield
    finally:
        _transforms[threading.get_ident()].pop()
        with _lock:
            _entered -= 1
            if not _entered:
                torch.autograd.backward = _torchs_own


def _backward(tensors: Any, grad_tensors: Any = None, *args: Any, **kwargs: Any) -> Any:
    """Stands in for `torch.autograd.backward`: applies the innermost transform, then the next one."""
    transforms = _transforms[threading.get_ident()]
    if not transforms:  # all have been applied, or this thread has none
        return _torchs_own(tensors, grad_tensors, *args, **kwargs)
    transform = transforms.pop()
    try:
        return _backward(transform(_one_loss(tensors, grad_tensors)), None, *args, **kwargs)
    finally:
        transforms.append(transform)


def _one_loss(tensors: Any, gradients: Any) -> Tensor:
    """Returns a scalar whose backward equals that of all `tensors` together, with their `gradients`."""
    tensors = (tensors,) if isinstance(tensors, Tensor) else tuple(tensors)
    gradients = (gradients,) if gradients is None or isinstance(gradients, Tensor) else tuple(gradients)
    gradients += (None,) * (len(tensors) - len(gradients))
    first, *others = (t if g is None else (t * g).sum() for t, g in zip(tensors, gradients, strict=True))
    total: Tensor = sum(others, first)
    return total
