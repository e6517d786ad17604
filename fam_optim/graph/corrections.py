"""Gradient formulas for operations whose backward in torch has wrong, missing or too coarse derivatives."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node

from fam_optim.graph import errors, nodes
from fam_optim.layer.use import LOW_PRECISION, at_least_float32

Gradients = Callable[..., tuple[Tensor, ...]]
Corrections = Sequence[tuple[Node, int, Gradients]]


def corrections(path: Iterable[Node], *, derivatives_to_come: int) -> Corrections:
    """Returns what makes a backward along a path right that is differentiated at most `derivatives_to_come`
    times, once or twice: each node concerned, after how many derivatives the correction is needed, and its
    gradient formula. Raises RuntimeError if torch has no second derivatives there."""
    errors.check_differentiable(path)
    concerned = [(node, *_CORRECTIONS[nodes.kind(node)]) for node in path if nodes.kind(node) in _CORRECTIONS]
    concerned = [row for row in concerned if derivatives_to_come >= row[1]]
    if not concerned:
        return []
    # A checkpoint recomputes its saved tensors once within a derivative, but once for each tensor outside.
    with errors.explained("second derivatives"):
        kept = nodes.within_derivative(
            lambda: [[nodes.kept(node, name) for name in names.split()] for node, _, names, _ in concerned]
        )
    rows = zip(concerned, kept, strict=True)
    return [(node, needed, partial(gradients, node, *of)) for (node, needed, _, gradients), of in rows]


def corrected(those: Corrections, *, derivatives_to_come: int) -> AbstractContextManager[None]:
    """Makes a backward in this context, to be differentiated once or twice more, use corrected gradients."""
    return nodes.hooked(
        (node, partial(_replaced, gradients))
        for node, needed_from, gradients in those
        if derivatives_to_come >= needed_from
    )


def _replaced(gradients: Gradients, old: Sequence[Tensor | None], grad_outputs: Sequence[Tensor]) -> Any:
    """Node hook: returns corrected gradients for the first operands and torch's own for the others."""
    new = gradients(grad_outputs[0])
    cast = (None if o is None else n.to(o.dtype) for o, n in zip(old, new, strict=False))
    return *cast, *old[len(new) :]


# Given a node, what it keeps and a gradient in its result, a formula returns the gradients in its operands.


def _layer_norm(
    node: Any, x: Tensor, weight: Tensor | None, shape: Sequence[int], inverse: Tensor, grad: Tensor
) -> tuple[Tensor, ...]:
    """Returns the gradients of layer_norm. torch's double backward treats the saved mean and deviation as
    constants when differentiated itself: third derivatives are silently wrong (pytorch/pytorch#175754)."""
    x, axes = at_least_float32(x), tuple(range(-len(shape), 0))
    centred = x - x.mean(axes, keepdim=True)
    variance = centred.square().mean(axes, keepdim=True)
    eps = (at_least_float32(inverse).pow(-2) - variance).detach()  # the node does not keep it
    scale = (variance + eps).rsqrt()
    normal = centred * scale
    g = grad if weight is None else grad * weight
    by_x = scale * (g - g.mean(axes, keepdim=True) - normal * (g * normal).mean(axes, keepdim=True))
    return by_x, (grad * normal).sum_to_size(shape), grad.sum_to_size(shape)


def is_largest(t: Tensor, dim: int) -> Tensor:
    """Returns a mask of the largest entry along an axis; of equal entries it marks one."""
    return torch.zeros_like(t, dtype=torch.bool).scatter(dim, t.argmax(dim, keepdim=True), True)


def _log_softmax(node: Any, log_p: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    """Returns the gradient of log_softmax, with the largest p computed as one minus all others. Otherwise its
    derivative ``p (1 - p)``, the curvature, is lost where p rounds to 1: in float32 from logits 17 apart."""
    grad, dim = at_least_float32(grad), nodes.softmax_axis(node)
    low = log_p.dtype in LOW_PRECISION
    log_p = at_least_float32(log_p).log_softmax(dim) if low else log_p
    top = is_largest(log_p, dim)
    others = log_p.exp().masked_fill(top, 0)
    total = grad.sum(dim, keepdim=True)
    at_top = others.sum(dim, keepdim=True) * total - grad.masked_fill(top, 0).sum(dim, keepdim=True)
    return (torch.where(top, at_top, grad - others * total),)


def _logsumexp(node: Any, x: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    """Returns the gradient of ``log sum exp x``: p, along one axis with the largest as in `_log_softmax`."""
    x, axes = at_least_float32(x), tuple(nodes.axes(node, x.dim()))
    total = x.logsumexp(axes, keepdim=True)
    p = (x - total).exp()
    if len(axes) == 1:
        top = is_largest(p, *axes)
        others = p.masked_fill(top, 0)
        p = torch.where(top, 1 - others.sum(axes, keepdim=True), others)
    return (grad.reshape(total.shape) * p,)


def _weight_norm(node: Any, v: Tensor, g: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    """Returns the gradients of ``g v / ||v||``; torch's second derivative in v is off by some per cent."""
    by_axis = nodes.axes(node, v.dim()) if nodes.kept(node, "dim") != -1 else set()
    axes = tuple(set(range(v.dim())) - by_axis)
    norm = v.square().sum(axes, keepdim=True).sqrt()
    along = (v * grad).sum(axes, keepdim=True) / norm
    return g / norm * (grad - v * along / norm), along.reshape(g.shape)


def _sigmoid(x: Tensor) -> Tensor:
    """Returns p = sigmoid(x), whose derivative ``p (1 - p)`` does not round to 0 where p rounds to 1."""
    x = at_least_float32(x)
    return torch.where(x > 0, 1 - (-x).sigmoid(), x.sigmoid())


def _binary_cross_entropy(
    node: Any, o: Tensor, y: Tensor, weight: Tensor | None, of_positives: Tensor | None, grad: Tensor
) -> tuple[Tensor, ...]:
    """Returns the gradient in the logits. torch's float32 curvature is 6 % off at logit 16, 0 from 18 on."""
    by_target = 1 if of_positives is None else 1 + (of_positives - 1) * y
    share = grad / (o.numel() if nodes.averages(node) else 1)
    by_o = share * (1 - y - by_target * _sigmoid(-o))
    return (by_o if weight is None else by_o * weight,)


def _softplus(node: Any, x: Tensor, beta: float, threshold: float, grad: Tensor) -> tuple[Tensor, ...]:
    """Returns the gradient of ``log(1 + exp(beta x)) / beta``, which is x where ``beta x > threshold``."""
    scaled = beta * at_least_float32(x)
    return (grad * torch.where(scaled > threshold, 1, _sigmoid(scaled)),)


_CORRECTIONS: dict[str, tuple[int, str, Gradients]] = {
    "WeightNormInterface": (1, "v g", _weight_norm),
    "Hardsigmoid": (1, "self", lambda node, x, grad: (grad * ((x > -3) & (x < 3)) / 6,)),
    "NativeLayerNorm": (2, "input weight normalized_shape result2", _layer_norm),
    "LogSoftmax": (2, "result", _log_softmax),
    "Logsumexp": (2, "self", _logsumexp),
    "BinaryCrossEntropyWithLogits": (2, "self target weight pos_weight", _binary_cross_entropy),
    "LogSigmoid": (2, "self", lambda node, x, grad: (grad * _sigmoid(-x),)),
    "Softplus": (2, "self beta threshold", _softplus),
}
"""By kind of node: how many derivatives must follow the backward for torch's to fail, the names of what the
node keeps that the formula needs, and the formula."""
