"""kappa of a softmax cross-entropy head written out, with parts of it held constant, and ways to weigh it.

    kappa = mean_i ||phi_i||^2 (sum_k p_ik ||w_k||^2 - ||sum_k p_ik w_k||^2)

With p and phi constant its gradient is ``2 T W``, as with ``FAM(..., detach_hessian=True)``. The tests
compare these lines with the library, which computes the same without cancellation and for any network.
"""

from collections.abc import Callable, Collection

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

Loss = Callable[[float, nn.Linear, Tensor, Tensor, Tensor], Tensor]  # value, head, phi, logits, targets
SMALLEST = 1e-6  # below it a kappa or a gradient of it counts as none: nothing is divided by less


def kappa_of_head(weight: Tensor, phi: Tensor, logits: Tensor, constant: Collection[str] = ()) -> Tensor:
    """kappa, (), of a mean cross-entropy; "p" and "phi" in ``constant`` pass no gradient."""
    p = logits.softmax(1)
    p = p.detach() if "p" in constant else p
    phi = phi.detach() if "phi" in constant else phi
    mean = p @ weight
    variance = (p * weight.square().sum(1)).sum(1) - mean.square().sum(1)
    return (phi.square().sum(1) * variance).mean()


def share_of_gradient(alpha: float, head: nn.Linear, phi: Tensor, logits: Tensor, targets: Tensor) -> Tensor:
    """loss + detached kappa, scaled so that its gradient in W has alpha times the length of the loss's."""
    loss = cross_entropy(logits, targets)
    kappa = kappa_of_head(head.weight, phi, logits, ("p", "phi"))
    (by_loss,) = torch.autograd.grad(loss, head.weight, retain_graph=True)
    (by_kappa,) = torch.autograd.grad(kappa, head.weight, retain_graph=True)
    factor: Tensor = alpha * by_loss.norm() / by_kappa.norm().clamp_min(SMALLEST)
    return loss + factor * kappa


def share_of_loss(alpha: float, head: nn.Linear, phi: Tensor, logits: Tensor, targets: Tensor) -> Tensor:
    """loss + detached kappa, scaled so that it is alpha times the loss."""
    loss = cross_entropy(logits, targets)
    kappa = kappa_of_head(head.weight, phi, logits, ("p", "phi"))
    return loss + alpha * loss.detach() / kappa.detach().clamp_min(SMALLEST) * kappa


def partly_constant(*constant: str) -> Loss:
    """loss + lam * kappa with parts of kappa held constant."""

    def penalized(lam: float, head: nn.Linear, phi: Tensor, logits: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy(logits, targets) + lam * kappa_of_head(head.weight, phi, logits, constant)

    return penalized
