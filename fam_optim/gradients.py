"""Which gradients a step may be made on: those of losses that were regularised, if they are finite."""

from __future__ import annotations

import weakref
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from fam_optim import unnoticed
from fam_optim.graph import nodes
from fam_optim.layer.use import is_sharded

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence


class Ledger:
    """Which gradients the layers' weights have: of losses that were regularised, or of others too.

    It sees every backward that reaches a trained weight of the layers, whoever calls it and how, and knows
    which of them are of a loss that FAM has handed out. What else is done to gradients (clipping, scaling,
    averaging, zeroing) is nobody's business. If it is `sound`, gradients that are there already may stay.

    Attributes:
        added: whether a backward has added to a gradient.
    """

    def __init__(
        self,
        named_weights: Sequence[tuple[str, list[Tensor]]],
        trained: Iterable[Tensor],
        *,
        sound: bool = False,
    ) -> None:
        self._names = ", ".join(name for name, _ in named_weights)
        self._trained = list(trained)
        ids = {id(p) for p in self._trained}
        self._of_layers = [w for _, weights in named_weights for w in weights if id(w) in ids]
        self._hooked: set[int] = set()
        self._sound = sound  # whether all gradients there are, are of regularised losses
        self._running: int | None = None  # the backward that has been noticed
        self._expected = False  # whether it is of one
        self._reached: list[Tensor] = []  # by it, before that was known
        self.added = False

    @property
    def _weights(self) -> list[Any]:
        """What is watched: the layers' weights, or all that is trained if these are frozen now."""
        weights = [w for w in self._of_layers if w.requires_grad]
        watched = weights or [p for p in self._trained if p.requires_grad]
        # A sharded weight gets its gradient from FSDP, not from a backward.
        return [w for w in watched if not is_sharded(w)]

    def watch(self) -> None:
        """Sees every backward from now on."""
        # By now lazy layers have weights, and what was frozen may be so no more.
        new = [w for w in self._weights if id(w) not in self._hooked and w.is_leaf]
        if new:
            self._hooked.update(map(id, new))
            note = partial(_if_alive, weakref.WeakMethod(self._note))
            handles = [w.register_post_accumulate_grad_hook(note) for w in new]
            weakref.finalize(self, _remove, handles)

    def expect(self, loss: Tensor) -> None:
        """Notes that a backward from `loss` is in order."""
        self.watch()
        begin = partial(_if_alive, weakref.WeakMethod(self._begin))
        loss.register_hook(begin)  # type: ignore[no-untyped-call]

    def check(self) -> None:
        """Raises RuntimeError if a gradient is there of a loss that was not regularised."""
        self._settle()
        if not self._sound and self._is_there():
            raise RuntimeError(
                f"gradients that are there already (`layer` {self._names}) are of a loss that was not "
                "regularised, so that its part of kappa is missing. Backpropagate what "
                "optimizer.regularize(loss) returned, for every loss and micro-batch of a step, with terms "
                "that it does not take added to that (in Lightning: `return "
                "self.optimizers().regularize(loss)` in training_step). If they are left from training "
                "without FAM, call optimizer.zero_grad() first. In a loop written for SAM, leave out the "
                "backward before the step, or call optimizer.zero_grad() in the closure."
            )

    def is_empty(self) -> bool:
        """Whether nothing that is trained has a gradient."""
        return all(p.grad is None for p in self._trained)

    def left(self, beside: Sequence[Tensor] = ()) -> Tensor | None:
        """Whether a gradient is not zero, without waiting for the answer; None if there is none."""
        weights = (w for w in self._weights if not any(w is b for b in beside))
        gradients = [w.grad for w in weights if w.grad is not None]
        found = [g.any().to(gradients[0].device) for g in gradients]
        return torch.stack(found).any() if found else None

    def _is_there(self, beside: Sequence[Tensor] = ()) -> bool:
        left = self.left(beside)
        return left is not None and bool(left)  # only zero_grad(set_to_none=False) makes this wait

    def _begin(self, gradient: Tensor) -> None:
        """Hook on a loss: its backward begins."""
        self._settle()
        self._sound = self._sound or not self._is_there(beside=self._reached)
        self._expected = True
        self._enter()

    def _note(self, weight: Tensor) -> None:
        """Hook on a weight: a backward has added to its gradient."""
        self.added = True
        if not self._expected:  # yet: it may also be of what was added to a regularised loss
            self._reached.append(weight)
            self._enter()

    def _enter(self) -> None:
        self._running = nodes.derivative()
        nodes.after_backward(self._end)

    def _end(self) -> None:
        self._sound = self._sound and (self._expected or not self._reached)
        self._running, self._expected, self._reached = None, False, []

    def _settle(self) -> None:
        """A backward that failed has not ended: what is there since may be of any loss."""
        if self._running not in (None, nodes.derivative()):
            self._sound = False
            self._end()


def _if_alive(hook: weakref.WeakMethod[Callable[[Tensor], None]], tensor: Tensor) -> None:
    alive = hook()
    if alive is not None:
        alive(tensor)


def _remove(handles: Iterable[Any]) -> None:
    for handle in handles:
        handle.remove()


class FiniteGuard:
    """No step on a penalty that is not finite while the loss is.

    Higher derivatives can be infinite where the first is not: of a norm or a standard deviation at 0, in
    torch's way of computing them. So gradients are looked at before the step. On the CPU the step is refused.
    On an accelerator, so as not to wait for it, the gradients become zero where they lie, and the next step
    is refused.
    """

    def __init__(self, names: str) -> None:
        self._names = names
        self._earlier: unnoticed.AsyncFlag | None = None

    def check(self, losses: Sequence[Tensor], trained: Iterable[Tensor]) -> None:
        """Raises RuntimeError if a gradient is not finite, although the losses that were regularised are."""
        if self._earlier is not None and self._earlier.read() is False:
            self._earlier = None
            raise RuntimeError(self._not_finite("An earlier step was made on zero gradients instead."))
        if not losses:
            return
        whole = [p.grad for p in trained if p.grad is not None]
        gradients = [g for g in map(_local, whole) if g.numel()]
        sound = ~_all_finite(losses) | _all_finite(gradients or losses)
        if any(map(is_sharded, whole)):  # all processes refuse, or none
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
            "is: higher derivatives of what follows the layer are infinite, or torch computes them as nan, "
            "where the first is finite (a norm, a standard deviation or a root at 0, as of a row of zeros). "
            "Use detach_hessian=True if kappa itself is finite, keep what is under the root away from 0 "
            "(F.normalize(x + eps), (x.square().sum() + eps).sqrt()), or regularise a layer behind it. "
            f"{done}"
        )


def _local(gradient: Tensor) -> Tensor:
    """The numbers of a gradient that this process has."""
    if is_sharded(gradient):
        gradient = gradient.to_local()  # type: ignore[attr-defined]
    return gradient._values() if gradient.is_sparse else gradient


def _all_finite(tensors: Sequence[Tensor]) -> Tensor:
    """Whether all numbers are, ``()``, on the device of the first tensor; in one reading of each."""
    device = tensors[0].device
    if unnoticed.reading_waits(tensors[0]):  # few operations for many tensors; nan is passed on
        largest = torch._foreach_norm(list(tensors), ord=torch.inf)
        return torch.stack([n.to(device, torch.float32) for n in largest]).isfinite().all()
    sums = [t.sum(dtype=torch.promote_types(t.dtype, torch.float32)).to(device) for t in tensors]
    finite = torch.stack(sums).isfinite().all()
    if bool(finite):
        return finite
    return torch.stack([t.isfinite().all() for t in tensors]).all()  # a sum of large numbers may be infinite
