"""Second derivatives of a loss along weight directions, taken at the layer's outputs.

A layer is linear in its weight, so moving W along V moves its output z by ``u = lin(phi; V)`` and

    <V, H V> = <u, Hess_z(L) u>                                                      (DESIGN, 3)

goes through the tail alone, whatever lies below the layer. Where one call of the layer feeds another,
phi itself moves with V and the second derivative of that move along the gradient comes on top.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fam_optim.compilation import is_compiled
from fam_optim.layer import LOW_PRECISION, at_least_float32
from fam_optim.parallel import communicates

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch.autograd.graph import Node

    from fam_optim.tail import Tail

_MATH_ATTENTION = (
    "Fused attention has no second derivative: run the forward under "
    "torch.nn.attention.sdpa_kernel(SDPBackend.MATH)."
)
_REMEDIES = {  # by a part of torch's message
    "scaled_dot_product": _MATH_ATTENTION,
    "_efficient_attention": _MATH_ATTENTION,
    "_flash_attention": _MATH_ATTENTION,
    "rnn": "Fused recurrent kernels have no second derivative: run the forward under "
    "torch.backends.cudnn.flags(enabled=False).",
    "use_reentrant": "Reentrant activation checkpointing has no second derivative: checkpoint what follows "
    "the layer with use_reentrant=False.",
    "second time": "The loss has been backpropagated already: compute kappa before backward(), or call "
    "backward(retain_graph=True).",
}


class Curvature:
    """The Hessian of the loss in the outputs z of one layer, as an operator.

    Cost: construction is one tail backward, a product about two more (four when `differentiable`).

    Attributes:
        uses: the layer's uses; z-shaped lists have one tensor for each.
        differentiable: whether products carry gradients to every parameter, or are constants.
        gradient: dL/dz, whose derivatives the products are; in float16 a multiple of it.
        half: whether anything on the way is float16, whose rounding is then that of the products.
    """

    def __init__(self, tail: Tail, *, differentiable: bool) -> None:
        _check_twice_differentiable(tail.path)
        self.tail = tail
        self.differentiable = differentiable
        self.uses = tail.uses
        self.half = any(
            made.dtype == torch.float16
            for node in (*tail.path, *tail.ends)
            for made in node._input_metadata  # what the node's gradient is to look like
        )
        self._scale = torch.ones_like(tail.loss)
        if self.half:
            self._fit_into_float16()
        self.gradient = self._scaled_gradient()
        if not differentiable and not tail.nested:
            self.uses = tuple(use.detached() for use in self.uses)

    def _scaled_gradient(self) -> list[Tensor]:
        with _exact_backwards(self.tail.path):
            gradient = _grad([self.tail.loss], self.tail, [self._scale], create_graph=True)
        return [at_least_float32(g).reshape(use.shape) for g, use in zip(gradient, self.uses, strict=True)]

    def _fit_into_float16(self) -> None:
        """Multiplies the loss by a power of two and divides the products by it, which changes nothing but
        that float16 holds them: derivatives of a sure softmax over a batch are below its range.

        The largest entry of the gradient, or of the product with a direction of unit size, becomes about
        one: there is as much room above as below then, for the derivatives of the products too.
        Measured without waiting for the device.
        """
        self._scale = torch.full_like(self.tail.loss, 2.0**7)
        self.gradient = self._scaled_gradient()
        unit = [
            torch.arange(g.numel(), dtype=g.dtype, device=g.device).cos().view_as(g) for g in self.gradient
        ]
        product = [self._scale * h for h in self.hvp(unit, constant=True)]
        size = torch.stack([t.detach().abs().max() for t in (*self.gradient, *product)]).max() / self._scale
        # What overflowed is large, what is zero may have underflowed.
        exponent = -size.nan_to_num(nan=torch.inf).log2().ceil()
        self._scale = exponent.clamp(-8, 15).exp2().to(self._scale).expand_as(self._scale)

    def lift(self, matrix: Tensor) -> list[Tensor]:
        """``u = lin(phi; matrix)`` for every use: where W moving along `matrix` ``(d, m)`` moves z."""
        return [use.lift(matrix) for use in self.uses]

    def hvp(self, directions: Sequence[Tensor], *, constant: bool = False) -> list[Tensor]:
        """``Hess_z(L) u`` for one direction u."""
        return self._pull(self.gradient, directions, create_graph=self.differentiable and not constant)

    def times(self, matrix: Tensor) -> Tensor:
        """``H V`` ``(d, m)``: the product in weight space, through all uses of the weight."""
        nested = self.tail.nested
        left = torch.zeros_like(matrix, requires_grad=True)
        at_left, at_right = self.lift(left), self.lift(matrix)
        # <left, H V> as a function of left; its gradient is H V.
        value = inner(
            at_left, self._pull(self.gradient, at_right, create_graph=self.differentiable or nested)
        )
        if nested:
            for u, v in ((at_left, at_right), (at_right, at_left)):
                value = value + inner(u, self._pull(v, self.gradient, create_graph=True))
        (product,) = torch.autograd.grad(value, left, create_graph=self.differentiable, retain_graph=True)
        return product

    def quadratic(self, matrix: Tensor) -> Tensor:
        """``<V, H V>``, differentiated through V as well.

        As H is symmetric, the gradient through one of the two V counts twice and the other may be a
        constant, which spares the backward through the product's own argument.
        """
        if self.tail.nested:
            constant = matrix.detach()
            return ((2 * matrix - constant) * self.times(constant)).sum()
        lifted = self.lift(matrix)
        constants = [u.detach() for u in lifted]
        twice = [2 * u - c for u, c in zip(lifted, constants, strict=True)]
        return inner(twice, self.hvp(constants))

    def _pull(
        self, outputs: Sequence[Tensor], weights: Sequence[Tensor], *, create_graph: bool
    ) -> list[Tensor]:
        """Gradient of ``<outputs, weights>`` in z; zero where it does not depend on z."""
        attached = [(o, w) for o, w in zip(outputs, weights, strict=True) if o.requires_grad]
        if not attached:
            return [torch.zeros_like(g) for g in self.gradient]
        # Exact once more in float16, where torch's own overflow: they square what they are given.
        with _exact_backwards(self.tail.path if self.half else ()):
            pulled = _grad(
                [o for o, _ in attached],
                self.tail,
                [w.to(o.dtype) for o, w in attached],
                create_graph=create_graph,
            )
        products = [
            torch.zeros_like(g) if p is None else at_least_float32(p).reshape(g.shape)
            for p, g in zip(pulled, self.gradient, strict=True)
        ]
        return [p / self._scale for p in products] if self.half else products


def inner(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    """``<left, right>`` over all uses."""
    return torch.stack([(a * b).sum() for a, b in zip(left, right, strict=True)]).sum()


def _check_twice_differentiable(path: Sequence[Node]) -> None:
    """Raises RuntimeError for nodes whose second derivatives torch gives wrong without a word."""
    for node in path:
        # torch refuses only where the region's backward depends on what requires gradients, and takes
        # second derivatives for zero elsewhere: in a compiled cross-entropy, say.
        if is_compiled(node):
            raise RuntimeError(
                "kappa needs second derivatives of what follows the layer, and a region compiled by "
                "torch.compile has none. Compile what comes before the layer and leave what follows it and "
                "the loss uncompiled: model.body.compile() instead of model.compile(), or "
                "torch.compiler.disable on what follows. (A softmax cross-entropy right on the layer's "
                "output needs none: only the loss must be outside.)"
            )
        # Backwards of DTensor's conversions lose their own graph; collectives would mix processes.
        if communicates(node):
            raise RuntimeError(
                f"kappa needs second derivatives of what follows the layer, and {node.name()} there "
                "communicates with other processes (tensor parallelism, SyncBatchNorm, a loss over gathered "
                "features), which has none. Regularise a layer behind it, or keep what follows the layer "
                "and the loss local to the process."
            )


def undifferentiable(tail: Tail) -> str | None:
    """Why kappa has no gradient through this tail, if it has none."""
    for node in tail.path:
        if "BatchNorm" in node.name() and getattr(node, "_saved_training", False):
            return (
                "the whole gradient of kappa needs the third derivative of what follows the layer, and "
                "torch has none of BatchNorm in train mode (batch_norm does not support 3rd+ order "
                "derivatives). kappa's value is exact. Use FAM(..., detach_hessian=True), put the BatchNorm "
                "layers behind the regularised layer in eval mode, or regularise a layer behind them."
            )
    return None


class _Undifferentiable(torch.autograd.Function):
    """The identity, whose backward raises: says in our words what torch would say late, or not at all."""

    @staticmethod
    def forward(ctx: Any, kappa: Tensor, why: str) -> Tensor:
        ctx.why = why
        return kappa.clone()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        raise RuntimeError(ctx.why)


def without_gradient(kappa: Tensor, why: str) -> Tensor:
    """`kappa`, from which a backward raises RuntimeError(why)."""
    attached: Tensor = _Undifferentiable.apply(kappa, why)
    return attached


def _grad(
    outputs: Sequence[Tensor], tail: Tail, grad_outputs: Sequence[Tensor] | None, *, create_graph: bool
) -> Any:
    """autograd.grad with respect to the layer's outputs, with errors that name the remedy."""
    try:
        return torch.autograd.grad(
            outputs,
            tail.edges,
            grad_outputs,
            create_graph=create_graph,
            retain_graph=True,
            allow_unused=True,
        )
    except RuntimeError as error:
        remedy = next((text for part, text in _REMEDIES.items() if part in str(error)), None)
        if remedy is None:
            raise
        raise RuntimeError(f"kappa needs second derivatives of what follows the layer. {remedy}") from error


@contextmanager
def _exact_backwards(path: Sequence[Node]) -> Iterator[None]:
    """Makes a differentiable backward right to all orders, where torch's own is not.

    Within this context the results of the nodes concerned are replaced by the same gradient, written
    out, see the functions below.
    """
    handles = []
    for node in path:
        exact = _exact_backward(node)
        if exact is not None:
            handles.append(node.register_hook(exact))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _exact_backward(node: Any) -> Callable[[Any, Any], Any] | None:
    name = node.name().rstrip("0123456789")  # in full: their backwards' own nodes go by longer names
    if name == "NativeLayerNormBackward":
        return _layer_norm_backward(node)
    if name == "LogSoftmaxBackward" and node._input_metadata[0].dtype in LOW_PRECISION:
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
        dim = saved_dim(node)
        p = at_least_float32(node._saved_result).softmax(dim)
        grad = at_least_float32(grad_outputs[0])
        exact = grad - p * grad.sum(dim, keepdim=True)
        return (exact.to(grad_inputs[0].dtype),)

    return backward


def saved_dim(node: Any) -> int:
    """The axis that a softmax or log_softmax was taken over."""
    dim: int = node._saved_dim
    if dim >= 2**63:  # a negative dimension comes back as unsigned
        dim -= 2**64
    result: Tensor = node._saved_result
    return dim % result.dim()
