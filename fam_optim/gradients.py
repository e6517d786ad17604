"""A step may only be made on gradients of losses that were regularised, and only if they are finite."""

import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fam_optim import unnoticed
from fam_optim.graph import nodes
from fam_optim.layer.use import is_sharded


class Ledger:
    """Knows whether all gradients of the layers' weights come from regularised losses. It sees every backward
    that reaches a trained weight of the layers, whoever calls it, and ignores clipping, say."""

    def __init__(
        self, names: str, of_layers: list[Tensor], trained: Callable[[], list[Tensor]], *, sound: bool = False
    ) -> None:
        self._names, self._of_layers = names, of_layers
        self._trained = trained  # asked each time, as groups of parameters may be added
        self._hooked: set[int] = set()
        self._sound = sound  # whether all present gradients, if any, come from regularised losses
        self._running: int | None = None  # the backward that was noticed and has not ended
        self._expected = False  # whether that backward started from a regularised loss
        self._reached: list[Tensor] = []  # weights that it reached before this was known
        self.added = False  # whether a backward has added to a gradient

    @property
    def _weights(self) -> list[Any]:
        """The weights to watch: those of the layers, or all trained ones if the layers are frozen now."""
        trained = [p for p in self._trained() if p.requires_grad]
        ids = set(map(id, trained))
        watched = [w for w in self._of_layers if id(w) in ids] or trained
        # A sharded weight gets its gradient from FSDP, not from a backward.
        return [w for w in watched if not is_sharded(w)]

    def watch(self) -> None:
        """Starts to watch every backward."""
        # Called again later, since lazy layers get weights and frozen weights may be unfrozen.
        note = _weak(self._note)
        for w in self._weights:
            if id(w) not in self._hooked and w.is_leaf:
                self._hooked.add(id(w))
                weakref.finalize(self, w.register_post_accumulate_grad_hook(note).remove)

    def expect(self, loss: Tensor) -> None:
        """Notes that `loss` was regularised, so that a backward from it is allowed."""
        self.watch()
        loss.register_hook(_weak(self._begin))  # type: ignore[no-untyped-call]

    def check(self) -> None:
        """Raises RuntimeError if a gradient comes from a loss that was not regularised."""
        self._settle()
        if not self._sound and self._is_there():
            raise RuntimeError(
                f"gradients that are there already (`layer` {self._names}) are of a loss that was not "
                "regularised, so that its part of kappa is missing. Backpropagate what "
                "optimizer.regularize(loss) returned, for every loss and micro-batch of a step, with terms "
                "that it does not take added to that (in Lightning: `return "
                "self.optimizers().regularize(loss)` in training_step). If they are left from training "
                "without FAM, call optimizer.zero_grad() first. In a loop written for SAM, leave out the "
                "backward before the step, or call zero_grad() in the closure."
            )

    def left(self, beside: Sequence[Tensor] = ()) -> Tensor | None:
        """Returns, without waiting for the device, whether a gradient is not zero; None if there is none."""
        weights = (w for w in self._weights if not any(w is b for b in beside))
        gradients = [w.grad for w in weights if w.grad is not None]
        found = [g.any().to(gradients[0].device) for g in gradients]
        return torch.stack(found).any() if found else None

    def _is_there(self, beside: Sequence[Tensor] = ()) -> bool:
        left = self.left(beside)
        return left is not None and bool(left)  # only zero_grad(set_to_none=False) makes this wait

    def _begin(self, gradient: Tensor) -> None:
        """Hook on a regularised loss: its backward begins."""
        self._settle()
        self._sound = self._sound or not self._is_there(beside=self._reached)
        self._expected = True
        self._enter()

    def _note(self, weight: Tensor) -> None:
        """Hook on a weight: a backward has added to its gradient."""
        self.added = True
        if not self._expected:  # not yet: a term that was added to a regularised loss may come first
            self._reached.append(weight)
            self._enter()

    def _enter(self) -> None:
        self._running = nodes.derivative()
        nodes.after_backward(self._end)

    def _end(self) -> None:
        self._sound = self._sound and (self._expected or not self._reached)
        self._running, self._expected, self._reached = None, False, []

    def _settle(self) -> None:
        """Ends a backward that failed: the gradients that it left may come from any loss."""
        if self._running not in (None, nodes.derivative()):
            self._sound = False
            self._end()


def _weak(method: Callable[[Tensor], None]) -> Callable[[Tensor], None]:
    """Returns a hook that calls a method as long as its object lives."""
    alive = weakref.WeakMethod(method)
    return lambda tensor: found(tensor) if (found := alive()) is not None else None


class FiniteGuard:
    """Prevents a step if the loss is finite but the gradient of the penalty is not, as higher derivatives can
    be infinite where the first is finite (of a norm at 0, say). On the CPU the step is refused. On an
    accelerator the gradients are set to zero in place and the next step is refused, to avoid waiting."""

    def __init__(self, names: str) -> None:
        self._names = names
        self._earlier: unnoticed.AsyncFlag | None = None

    def check(self, losses: Sequence[Tensor], trained: Iterable[Tensor]) -> None:
        """Raises RuntimeError if a gradient is not finite although the regularised losses are."""
        if self._earlier is not None and self._earlier.read() is False:
            self._earlier = None
            raise RuntimeError(self._not_finite("An earlier step was made on zero gradients instead."))
        if not losses:
            return
        whole = [p.grad for p in trained if p.grad is not None]
        gradients = [g for g in map(_local, whole) if g.numel()]
        sound = ~_all_finite(losses) | _all_finite(gradients or losses)
        if any(map(is_sharded, whole)):  # all processes must refuse, or none
            everywhere = sound.to(torch.float32)
            dist.all_reduce(everywhere, dist.ReduceOp.MIN)
            sound = everywhere.bool()
        if unnoticed.reading_waits(sound):
            for gradient in gradients:
                gradient.masked_fill_(~sound.to(gradient.device), 0)
            self._earlier = unnoticed.AsyncFlag(sound)
        elif not bool(sound):
            raise RuntimeError(self._not_finite("No step was made, and nothing was changed."))

    def _not_finite(self, done: str) -> str:
        return (
            f"the gradient of loss + lam * kappa (`layer` {self._names}) is not finite, although the loss "
            "is: higher derivatives of what follows the layer are infinite or nan where the first is finite "
            "(a norm, standard deviation or root at 0). Use detach_hessian=True if kappa itself is finite, "
            "keep what is under the root away from 0 (F.normalize(x + eps), (x.square().sum() + "
            f"eps).sqrt()), or take a layer behind it. {done}"
        )


def _local(gradient: Tensor) -> Tensor:
    """Returns the part of a gradient that this process holds, as a dense tensor."""
    if is_sharded(gradient):
        gradient = gradient.to_local()  # type: ignore[attr-defined]
    return gradient._values() if gradient.is_sparse else gradient


def _all_finite(tensors: Sequence[Tensor]) -> Tensor:
    """Returns whether all numbers are finite, ``()``, on the device of the first tensor."""
    device = tensors[0].device
    if unnoticed.reading_waits(tensors[0]):  # few operations for many tensors; the norm of nan is nan
        largest = torch._foreach_norm(list(tensors), ord=torch.inf)
        return torch.stack([n.to(device, torch.float32) for n in largest]).isfinite().all()
    sums = [t.sum(dtype=torch.promote_types(t.dtype, torch.float32)).to(device) for t in tensors]
    finite = torch.stack(sums).isfinite().all()
    if bool(finite):
        return finite
    return torch.stack([t.isfinite().all() for t in tensors]).all()  # a sum of large numbers may be infinite
