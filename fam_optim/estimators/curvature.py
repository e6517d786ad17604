"""Second derivatives of a loss along weight directions, taken at the layer's outputs.

A layer is linear in its weight, so moving W along V moves its output z by ``u = lin(phi; V)`` and

    <V, H V> = <u, Hess_z(L) u>                                                      (DESIGN, 3)

goes through the tail alone, whatever lies below the layer. Where one call of the layer feeds another,
phi itself moves with V and the second derivative of that move along the gradient comes on top.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fam_optim.graph import errors, nodes
from fam_optim.graph.corrections import exact_backwards
from fam_optim.layer.use import at_least_float32

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch.autograd.graph import Node

    from fam_optim.graph.trace import Tail


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
        check_differentiable(tail.path)
        self.tail = tail
        self.differentiable = differentiable
        self.uses = tail.uses
        self.half = any(
            made.dtype == torch.float16 for node in (*tail.path, *tail.ends) for made in nodes.results(node)
        )
        self._scale = torch.ones_like(tail.loss)
        if self.half:
            self._fit_into_float16()
        self.gradient = self._scaled_gradient()
        check_functions(tail.path, self.gradient)
        if not differentiable and not tail.nested:
            self.uses = tuple(use.detached() for use in self.uses)

    def _scaled_gradient(self) -> list[Tensor]:
        with exact_backwards(self.tail.path, first=True):
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
        # As the first in float16, where torch's own overflow, since they square what they are given; and
        # where one call feeds another, when what is pulled back is a direction that depends on z itself.
        with exact_backwards(self.tail.path, first=self.half or self.tail.nested):
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


def check_differentiable(path: Iterable[Node]) -> None:
    """Raises RuntimeError for nodes whose second derivatives torch gives wrong without a word."""
    for node in path:
        # torch refuses only where the region's backward depends on what requires gradients, and takes
        # second derivatives for zero elsewhere: in a compiled cross-entropy, say.
        if nodes.is_compiled(node):
            raise RuntimeError(
                "kappa needs second derivatives of what follows the layer, and a region compiled by "
                "torch.compile has none. Compile what comes before the layer and leave what follows it and "
                "the loss uncompiled: model.body.compile() instead of model.compile(), or "
                "torch.compiler.disable on what follows. (A softmax cross-entropy right on the layer's "
                "output needs none: only the loss must be outside.)"
            )
        # Backwards of DTensor's conversions lose their own graph; collectives would mix processes.
        if nodes.communicates(node):
            raise RuntimeError(
                f"kappa needs second derivatives of what follows the layer, and {node.name()} there "
                "communicates with other processes (tensor parallelism, SyncBatchNorm, a loss over gathered "
                "features), which has none. Regularise a layer behind it, or keep what follows the layer "
                "and the loss local to the process."
            )


def check_functions(path: Iterable[Node], gradient: Sequence[Tensor]) -> None:
    """Raises RuntimeError for an autograd.Function whose backward is marked with once_differentiable.

    torch's own error for it stands on the graph where a derivative with respect to the layer's outputs does
    not pass, so their second derivative comes out without what goes through the function.
    """
    if not any(nodes.is_function(node) for node in path):
        return
    stack = [g.grad_fn for g in gradient]
    seen: set[Node | None] = {None}
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        if nodes.is_error(node):
            functions = ", ".join(sorted({nodes.kind(n) for n in path if nodes.is_function(n)}))
            raise RuntimeError(
                "kappa needs second derivatives of what follows the layer, and an autograd.Function there "
                f"({functions}) has none: its backward is marked with once_differentiable, or calls one that "
                "is. Write what it computes out in elementary operations, or regularise a layer behind it."
            )
        seen.add(node)
        stack.extend(below for below, _ in node.next_functions)


def undifferentiable(tail: Tail) -> str | None:
    """Why kappa has no gradient through this tail, if it has none."""
    for node in tail.path:
        if nodes.normalises_over_batch(node):
            # InstanceNorm and weight standardisation call batch_norm with all samples or filters in one.
            one = nodes.shape(node, 0)[0] == 1
            remedy = (
                "replace nn.InstanceNorm by nn.GroupNorm(channels, channels), which computes the same, and "
                "write weight standardisation out (w - w.mean()) / w.std()"
                if one
                else "put the BatchNorm layers behind the regularised layer in eval mode"
            )
            return (
                "the whole gradient of kappa needs the third derivative of what follows the layer, and "
                f"torch has none of {'InstanceNorm' if one else 'BatchNorm in train mode'} (batch_norm does "
                "not support 3rd+ order derivatives). kappa's value is exact. Use FAM(..., "
                f"detach_hessian=True), {remedy}, or regularise a layer behind them."
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
    with errors.explained("second derivatives"):
        return torch.autograd.grad(
            outputs,
            tail.edges,
            grad_outputs,
            create_graph=create_graph,
            retain_graph=True,
            allow_unused=True,
        )
