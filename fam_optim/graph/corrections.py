"""Torch's backwards made right, where their own derivatives are wrong, missing or too coarse."""

from __future__ import annotations

from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.checkpoint import CheckpointError

from fam_optim.graph import nodes
from fam_optim.layer.use import LOW_PRECISION, at_least_float32

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from torch import Tensor
    from torch.autograd.graph import Node

    Gradients = Callable[[Any, Tensor], tuple[Tensor, ...] | None]


@contextmanager
def corrected(path: Iterable[Node], *, derivatives_to_come: int) -> Iterator[None]:
    """Makes a differentiable backward along a path right to all orders, where torch's own is not: the results
    of the nodes concerned are replaced by the same gradient, written out.

    Args:
        derivatives_to_come: how often its result will be differentiated, once or twice.
    """
    handles = []
    for node in path:
        needed_from, gradients = _CORRECTIONS.get(nodes.kind(node), (3, None))
        if gradients is not None and derivatives_to_come >= needed_from:
            handles.append(node.register_hook(partial(_replaced, node, gradients)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _replaced(
    node: Node, gradients: Gradients, old: Sequence[Tensor | None], grad_outputs: Sequence[Tensor]
) -> Any:
    """Hook on a node: the gradients of its first operands written out, those of the others as they are."""
    new = gradients(node, grad_outputs[0])
    if new is None:
        return None
    cast = (None if o is None else n.to(o.dtype) for o, n in zip(old, new, strict=False))
    return *cast, *old[len(new) :]


# Each is given a node and the gradient in its result, and returns those in its operands; None leaves torch's.


def _layer_norm(node: Any, grad: Tensor) -> tuple[Tensor, ...]:
    """torch's double backward of layer_norm takes the saved mean and deviation for constants when it is
    itself differentiated, so third derivatives are wrong, silently (pytorch/pytorch#175754)."""
    x, weight = at_least_float32(nodes.kept(node, "input")), nodes.kept(node, "weight")
    axes = tuple(range(-len(nodes.kept(node, "normalized_shape")), 0))
    centred = x - x.mean(axes, keepdim=True)
    variance = centred.square().mean(axes, keepdim=True)
    inverse_deviation = at_least_float32(nodes.kept(node, "result2"))
    eps = (inverse_deviation.pow(-2) - variance).detach()  # the node does not keep it
    scale = (variance + eps).rsqrt()
    normal = centred * scale
    g = grad if weight is None else grad * weight
    by_x = scale * (g - g.mean(axes, keepdim=True) - normal * (g * normal).mean(axes, keepdim=True))
    lead = tuple(range(x.dim() - len(axes)))
    return by_x, (grad * normal).sum(lead), grad.sum(lead)


def is_largest(t: Tensor, dim: int) -> Tensor:
    """Which entry is the largest along an axis; one of several."""
    return torch.zeros_like(t, dtype=torch.bool).scatter(dim, t.argmax(dim, keepdim=True), True)


def _log_softmax(node: Any, grad: Tensor) -> tuple[Tensor, ...] | None:
    """The derivative of the largest p is ``p (1 - p)``, and lost where p rounds to one, with the curvature:
    in float32 from a gap of 17 between logits on. So that p is one less all others."""
    try:
        log_p = nodes.kept(node, "result")
    except CheckpointError:  # it gives a tensor away once, and torch has it
        return None
    grad, dim = at_least_float32(grad), nodes.softmax_axis(node)
    low = log_p.dtype in LOW_PRECISION
    log_p = at_least_float32(log_p).log_softmax(dim) if low else log_p
    top = is_largest(log_p, dim)
    others = log_p.exp().masked_fill(top, 0)
    total = grad.sum(dim, keepdim=True)
    at_top = others.sum(dim, keepdim=True) * total - grad.masked_fill(top, 0).sum(dim, keepdim=True)
    return (torch.where(top, at_top, grad - others * total),)


def _hardsigmoid(node: Any, grad: Tensor) -> tuple[Tensor, ...]:
    """torch's backward of hardsigmoid, relu6(x + 3) / 6, has no derivative; it is linear in the gradient."""
    x = nodes.kept(node, "self")
    return (grad * ((x > -3) & (x < 3)) / 6,)


def _weight_norm(node: Any, grad: Tensor) -> tuple[Tensor, ...]:
    """``w = g v / ||v||``: torch's second derivative in v is off by some per cent (2.6 to 2.15)."""
    v, g = nodes.kept(node, "v"), nodes.kept(node, "g")
    by_axis = nodes.axes(node, v.dim()) if nodes.kept(node, "dim") != -1 else set()
    axes = tuple(set(range(v.dim())) - by_axis)
    norm = v.square().sum(axes, keepdim=True).sqrt()
    along = (v * grad).sum(axes, keepdim=True) / norm
    return g / norm * (grad - v * along / norm), along.reshape(g.shape)


def _sigmoid(x: Tensor) -> Tensor:
    """``1 / (1 + exp(-x))`` in at least float32, whose derivative ``p (1 - p)`` does not round to 0 where p
    rounds to 1."""
    x = at_least_float32(x)
    return torch.where(x > 0, 1 - (-x).sigmoid(), x.sigmoid())


def _binary_cross_entropy(node: Any, grad: Tensor) -> tuple[Tensor, ...]:
    """In float32 torch's own curvature is 6 % off at a logit of 16, and 0 from 18 on."""
    o, y, weight, of_positives = nodes.binary_targets(node)
    by_target = 1 if of_positives is None else 1 + (of_positives - 1) * y
    share = grad / (o.numel() if nodes.averages(node) else 1)
    by_o = share * (1 - y - by_target * _sigmoid(-o))
    return (by_o if weight is None else by_o * weight,)


def _log_sigmoid(node: Any, grad: Tensor) -> tuple[Tensor, ...]:
    """As above, of ``log(sigmoid(x))``."""
    return (grad * _sigmoid(-nodes.kept(node, "self")),)


def _softplus(node: Any, grad: Tensor) -> tuple[Tensor, ...]:
    """As above, of ``log(1 + exp(beta x)) / beta``, which is x beyond a threshold."""
    scaled = nodes.kept(node, "beta") * at_least_float32(nodes.kept(node, "self"))
    return (grad * torch.where(scaled > nodes.kept(node, "threshold"), 1, _sigmoid(scaled)),)


_CORRECTIONS: dict[str, tuple[int, Gradients]] = {
    "WeightNormInterface": (1, _weight_norm),
    "Hardsigmoid": (1, _hardsigmoid),
    "NativeLayerNorm": (2, _layer_norm),
    "LogSoftmax": (2, _log_softmax),
    "BinaryCrossEntropyWithLogits": (2, _binary_cross_entropy),
    "LogSigmoid": (2, _log_sigmoid),
    "Softplus": (2, _softplus),
}
"""By kind of node: how many derivatives must be to come for torch's backward not to do, and the right one."""
