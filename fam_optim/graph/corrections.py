"""Torch's backwards made right, where their own derivatives are wrong, missing or too coarse."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from fam_optim.graph import nodes
from fam_optim.layer.use import LOW_PRECISION, at_least_float32

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from torch import Tensor
    from torch.autograd.graph import Node

    Backward = Callable[[Any, Any], Any]


@contextmanager
def corrected(path: Iterable[Node], *, derivatives_to_come: int) -> Iterator[None]:
    """Makes a differentiable backward right to all orders, where torch's own is not.

    Within this context the results of the nodes concerned are replaced by the same gradient, written out, see
    the functions below.

    Args:
        path: the nodes that the backward passes.
        derivatives_to_come: how often its result will be differentiated, once or twice.
    """
    handles = []
    for node in path:
        make = _CORRECTIONS.get(nodes.kind(node))
        backward = make(node, derivatives_to_come) if make is not None else None
        if backward is not None:
            handles.append(node.register_hook(backward))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _layer_norm_backward(node: Any, to_come: int) -> Backward | None:
    """torch's double backward of layer_norm takes the saved mean and deviation for constants when it is
    itself differentiated, so third derivatives are wrong, silently (pytorch/pytorch#175754)."""
    if to_come < 2:
        return None

    def backward(grad_inputs: Sequence[Tensor | None], grad_outputs: Sequence[Tensor]) -> Any:
        x, weight, grad = (
            at_least_float32(nodes.kept(node, "input")),
            nodes.kept(node, "weight"),
            grad_outputs[0],
        )
        axes = tuple(range(-nodes.normalised_axes(node), 0))
        centred = x - x.mean(axes, keepdim=True)
        variance = centred.square().mean(axes, keepdim=True)
        eps = (
            at_least_float32(nodes.kept(node, "result2")).pow(-2) - variance
        ).detach()  # the node does not keep it
        scale = (variance + eps).rsqrt()
        normal = centred * scale
        g = grad if weight is None else grad * weight
        by_x = scale * (g - g.mean(axes, keepdim=True) - normal * (g * normal).mean(axes, keepdim=True))
        lead = tuple(range(x.dim() - len(axes)))
        exact = (by_x, (grad * normal).sum(lead), grad.sum(lead))
        return tuple(
            e.to(old.dtype) if old is not None else None for e, old in zip(exact, grad_inputs, strict=True)
        )

    return backward


def _log_softmax_backward(node: Any, to_come: int) -> Backward | None:
    """In half precision a probability near one rounds to one, and with ``1 - p`` the curvature is gone.
    log p still tells them apart, so p is made from it again, in float32 (log_softmax is idempotent)."""
    if to_come < 2 or nodes.results(node)[0].dtype not in LOW_PRECISION:
        return None

    def backward(grad_inputs: Sequence[Tensor], grad_outputs: Sequence[Tensor]) -> Any:
        dim = nodes.softmax_axis(node)
        p = at_least_float32(nodes.kept(node, "result")).softmax(dim)
        grad = at_least_float32(grad_outputs[0])
        exact = grad - p * grad.sum(dim, keepdim=True)
        return (exact.to(grad_inputs[0].dtype),)

    return backward


def _hardsigmoid_backward(node: Any, to_come: int) -> Backward | None:
    """torch's backward of hardsigmoid, relu6(x + 3) / 6, has no derivative; it is linear in the gradient."""

    def backward(grad_inputs: Sequence[Tensor], grad_outputs: Sequence[Tensor]) -> Any:
        x = nodes.kept(node, "self")
        inside = (x > -3) & (x < 3)
        return (grad_outputs[0] * inside / 6,)

    return backward


def _weight_norm_backward(node: Any, to_come: int) -> Backward | None:
    """``w = g v / ||v||``: torch's second derivative in v is off by some per cent (2.6 to 2.15)."""

    def backward(grad_inputs: Sequence[Tensor | None], grad_outputs: Sequence[Tensor]) -> Any:
        v, g, grad = nodes.kept(node, "v"), nodes.kept(node, "g"), grad_outputs[0]
        kept = nodes.axes(node, v.dim()) if nodes.kept(node, "dim") != -1 else set()
        axes = tuple(set(range(v.dim())) - kept)
        norm = v.square().sum(axes, keepdim=True).sqrt()
        along = (v * grad).sum(axes, keepdim=True) / norm
        exact = (g / norm * (grad - v * along / norm), along.reshape(g.shape))
        return tuple(None if old is None else e for e, old in zip(exact, grad_inputs, strict=True))

    return backward


def _sigmoid(x: Tensor) -> Tensor:
    """``1 / (1 + exp(-x))``, whose derivative ``p (1 - p)`` does not round to 0 where p rounds to 1."""
    return torch.where(x > 0, 1 - (-x).sigmoid(), x.sigmoid())


def _binary_cross_entropy_backward(node: Any, to_come: int) -> Backward | None:
    """In float32 torch's own curvature is 6 % off at a logit of 16, and 0 from 18 on."""
    if to_come < 2:
        return None

    def backward(grad_inputs: Sequence[Tensor | None], grad_outputs: Sequence[Tensor]) -> Any:
        o, y, weight, of_positives = nodes.binary_targets(node)
        by_target = 1 if of_positives is None else 1 + (of_positives - 1) * y
        by_o = 1 - y - by_target * _sigmoid(-at_least_float32(o))
        share = grad_outputs[0] / (o.numel() if nodes.averages(node) else 1)
        exact = share * by_o if weight is None else share * by_o * weight
        return exact.to(o.dtype), *grad_inputs[1:]

    return backward


def _log_sigmoid_backward(node: Any, to_come: int) -> Backward | None:
    """As above, of ``log(sigmoid(x))``."""
    if to_come < 2:
        return None

    def backward(grad_inputs: Sequence[Tensor | None], grad_outputs: Sequence[Tensor]) -> Any:
        x = nodes.kept(node, "self")
        return ((grad_outputs[0] * _sigmoid(-at_least_float32(x))).to(x.dtype),)

    return backward


def _softplus_backward(node: Any, to_come: int) -> Backward | None:
    """As above, of ``log(1 + exp(beta x)) / beta``, which is x beyond a threshold."""
    if to_come < 2:
        return None

    def backward(grad_inputs: Sequence[Tensor | None], grad_outputs: Sequence[Tensor]) -> Any:
        x, beta = nodes.kept(node, "self"), nodes.kept(node, "beta")
        slope = torch.where(beta * x > nodes.kept(node, "threshold"), 1, _sigmoid(beta * at_least_float32(x)))
        return ((grad_outputs[0] * slope).to(x.dtype),)

    return backward


_CORRECTIONS: dict[str, Callable[[Any, int], Backward | None]] = {
    "NativeLayerNorm": _layer_norm_backward,
    "WeightNormInterface": _weight_norm_backward,
    "Hardsigmoid": _hardsigmoid_backward,
    "LogSoftmax": _log_softmax_backward,
    "BinaryCrossEntropyWithLogits": _binary_cross_entropy_backward,
    "LogSigmoid": _log_sigmoid_backward,
    "Softplus": _softplus_backward,
}
