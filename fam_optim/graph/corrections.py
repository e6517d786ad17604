"""Torch's backwards made right, where their own derivatives are wrong, missing or too coarse."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from fam_optim.graph import nodes
from fam_optim.layer.use import LOW_PRECISION, at_least_float32

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from torch import Tensor
    from torch.autograd.graph import Node


@contextmanager
def exact_backwards(path: Iterable[Node], *, first: bool) -> Iterator[None]:
    """Makes a differentiable backward right to all orders, where torch's own is not.

    Within this context the results of the nodes concerned are replaced by the same gradient, written
    out, see the functions below. With `first` that is of a backward to be differentiated twice more, else of
    one to be differentiated once.
    """
    handles = []
    for node in path:
        exact = _exact_backward(node, first)
        if exact is not None:
            handles.append(node.register_hook(exact))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _exact_backward(node: Any, first: bool) -> Callable[[Any, Any], Any] | None:
    kind = nodes.kind(node)
    if kind == "NativeLayerNorm" and first:
        return _layer_norm_backward(node)
    if kind == "WeightNormInterface":
        return _weight_norm_backward(node)
    if kind == "Hardsigmoid":
        return _hardsigmoid_backward(node)
    if kind == "LogSoftmax" and first and nodes.results(node)[0].dtype in LOW_PRECISION:
        return _log_softmax_backward(node)
    return None


def _layer_norm_backward(node: Any) -> Callable[[Any, Any], Any]:
    """torch's double backward of layer_norm takes the saved mean and deviation for constants when it is
    itself differentiated, so third derivatives are wrong, silently (pytorch/pytorch#175754)."""

    def backward(grad_inputs: Sequence[Tensor | None], grad_outputs: Sequence[Tensor]) -> Any:
        x, weight, grad = at_least_float32(node._saved_input), node._saved_weight, grad_outputs[0]
        axes = tuple(range(-len(node._saved_normalized_shape), 0))
        centred = x - x.mean(axes, keepdim=True)
        variance = centred.square().mean(axes, keepdim=True)
        eps = (at_least_float32(node._saved_result2).pow(-2) - variance).detach()  # the node does not keep it
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


def _log_softmax_backward(node: Any) -> Callable[[Any, Any], Any]:
    """In half precision a probability near one rounds to one, and with ``1 - p`` the curvature is gone.
    log p still tells them apart, so p is made from it again, in float32 (log_softmax is idempotent)."""

    def backward(grad_inputs: Sequence[Tensor], grad_outputs: Sequence[Tensor]) -> Any:
        dim = nodes.softmax_axis(node)
        p = at_least_float32(node._saved_result).softmax(dim)
        grad = at_least_float32(grad_outputs[0])
        exact = grad - p * grad.sum(dim, keepdim=True)
        return (exact.to(grad_inputs[0].dtype),)

    return backward


def _hardsigmoid_backward(node: Any) -> Callable[[Any, Any], Any]:
    """torch's backward of hardsigmoid, relu6(x + 3) / 6, has no derivative; it is linear in the gradient."""

    def backward(grad_inputs: Sequence[Tensor], grad_outputs: Sequence[Tensor]) -> Any:
        x = node._saved_self
        inside = (x > -3) & (x < 3)
        return (grad_outputs[0] * inside / 6,)

    return backward


def _weight_norm_backward(node: Any) -> Callable[[Any, Any], Any]:
    """``w = g v / ||v||``: torch's second derivative in v is off by some per cent (2.6 to 2.15)."""

    def backward(grad_inputs: Sequence[Tensor | None], grad_outputs: Sequence[Tensor]) -> Any:
        v, g, grad = node._saved_v, node._saved_g, grad_outputs[0]
        kept = nodes.axes(node, "dim", v.dim()) if node._saved_dim != -1 else set()
        axes = tuple(set(range(v.dim())) - kept)
        norm = v.square().sum(axes, keepdim=True).sqrt()
        along = (v * grad).sum(axes, keepdim=True) / norm
        exact = (g / norm * (grad - v * along / norm), along.reshape(g.shape))
        return tuple(None if old is None else e for e, old in zip(exact, grad_inputs, strict=True))

    return backward
