"""What a step may do with the gradients that it finds: add to them only if they hold their share of kappa,
step on them only if the penalty left them finite."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from fam_optim.graph import flags
from fam_optim.layer.use import is_sharded
from fam_optim.layers import weights_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from fam_optim.flatness import Layer
    from fam_optim.penalty import Penalty


def check_complete(penalty: Penalty, trained: Iterable[Tensor]) -> None:
    """Before the first backward of a closure: refuses to add to gradients that lack their kappa.

    So do loops that accumulate with plain backwards and close with a closure (Lightning with
    accumulate_grad_batches), or that call backward before the step as well (SAM). Gradients that are
    still those of FAM's last step are in order: whoever does not zero them, accumulates.
    """
    for p in _watched(penalty.layers, list(trained)):
        if p.grad is None or getattr(p.grad, "_of_fam_step", None) == p.grad._version:
            continue
        if not bool(p.grad.any()):  # only zero_grad(set_to_none=False) makes this look at numbers
            continue
        raise RuntimeError(
            f"the closure would add to gradients that are there already (`layer` {penalty.names}), of a "
            "backward that FAM did not see: the sum would lack part of lam * kappa. To accumulate gradients, "
            "call optimizer.regularize(loss) on every micro-batch's loss (in Lightning: `return "
            "self.optimizers().regularize(loss)` in training_step). If they are left from training "
            "without FAM, call optimizer.zero_grad() first. In a loop written for SAM, leave out the "
            "backward before the step, or call optimizer.zero_grad() in the closure."
        )


def mark_stepped_on(penalty: Penalty, trained: Iterable[Tensor]) -> None:
    """After a step: its gradients are in order, should the next closure add to them."""
    for p in _watched(penalty.layers, list(trained)):
        if p.grad is not None:
            p.grad._of_fam_step = p.grad._version  # type: ignore[attr-defined]


def _watched(layers: Sequence[Layer], trained: Sequence[Tensor]) -> Sequence[Tensor]:
    """The parameters whose gradients show what was backpropagated: the layers', if they are trained."""
    weights = [w for layer in layers for w in weights_of(layer) if w.requires_grad]
    ids = {id(p) for p in trained}
    return [w for w in weights if id(w) in ids] or [p for p in trained if p.requires_grad]


class FiniteGuard:
    """No step on a penalty that is not finite while the loss is.

    Higher derivatives can be infinite where the first is not: of a norm or a standard deviation at 0, in
    torch's way of computing them. Gradients of a penalty that can be so are looked at before the step. On
    the CPU the step is refused. On an accelerator, so as not to wait for it, the gradients become zero where
    they lie, and the next step is refused.

    Cost: one reading of the gradients.
    """

    def __init__(self) -> None:
        self._earlier: flags.AsyncFlag | None = None

    def check(self, penalty: Penalty, trained: Iterable[Tensor]) -> None:
        """Raises RuntimeError if a gradient is not finite, although the losses that were regularised are."""
        if self._earlier is not None and self._earlier.read() is False:
            self._earlier = None
            raise RuntimeError(_not_finite(penalty) + " An earlier step was made on zero gradients instead.")
        if not penalty.losses:
            return
        whole = [p.grad for p in trained if p.grad is not None]
        gradients = [g for g in map(_local, whole) if g.numel()]
        sound = ~_all_finite(penalty.losses) | _all_finite(gradients or penalty.losses)
        if any(map(is_sharded, whole)):  # all processes refuse, or none
            everywhere = sound.to(torch.float32)
            dist.all_reduce(everywhere, dist.ReduceOp.MIN)
            sound = everywhere.bool()
        if not flags.reading_waits(sound):
            if not bool(sound):
                raise RuntimeError(_not_finite(penalty) + " No step was made, and nothing was changed.")
            return
        for gradient in gradients:
            gradient.masked_fill_(~sound.to(gradient.device), 0)
        self._earlier = flags.AsyncFlag(sound)


def _not_finite(penalty: Penalty) -> str:
    return (
        f"the gradient of loss + lam * kappa (`layer` {penalty.names}) is not finite, although the loss is: "
        "higher derivatives of what follows the layer are infinite, or torch computes them as nan, where the "
        "first is finite (a norm, a standard deviation or a root at 0, as of a row of zeros). Use "
        "detach_hessian=True if kappa itself is finite, keep what is under the root away from 0 "
        "(F.normalize(x + eps), (x.square().sum() + eps).sqrt()), or regularise a layer behind it."
    )


def _local(gradient: Tensor) -> Tensor:
    """The numbers of a gradient that this process has."""
    if is_sharded(gradient):
        gradient = gradient.to_local()  # type: ignore[attr-defined]
    return gradient._values() if gradient.is_sparse else gradient


def _all_finite(tensors: Sequence[Tensor]) -> Tensor:
    """Whether all numbers are, ``()``, on the device of the first tensor; in one reading of each."""
    device = tensors[0].device
    if flags.reading_waits(tensors[0]):  # few operations for many tensors; nan is passed on
        largest = torch._foreach_norm(list(tensors), ord=torch.inf)
        return torch.stack([n.to(device, torch.float32) for n in largest]).isfinite().all()
    sums = [t.sum(dtype=torch.promote_types(t.dtype, torch.float32)).to(device) for t in tensors]
    finite = torch.stack(sums).isfinite().all()
    if bool(finite):
        return finite
    return torch.stack([t.isfinite().all() for t in tensors]).all()  # a sum of large numbers may be infinite
