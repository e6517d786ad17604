"""Second derivatives of a loss along weight directions, taken at the layer's outputs.

A layer is linear in its weight, so moving W along V moves its output z by ``u = lin(phi; V)`` and

    <V, H V> = <u, Hess_z(L) u>

goes through the tail alone, whatever lies below the layer. Where one call of the layer feeds another,
phi itself moves with V and the second derivative of that move along the gradient comes on top.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fam_optim.estimators.measure import doubled
from fam_optim.graph import errors, nodes
from fam_optim.graph.corrections import corrected, corrections
from fam_optim.layer.use import at_least_float32

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fam_optim.graph.trace import Tail


class Curvature:
    """The Hessian of the loss in the outputs z of one layer, as an operator.

    Cost: construction is one tail backward, a product about two more (four when `differentiable`).

    Attributes:
        uses: the layer's uses; z-shaped lists have one tensor for each.
        gradient: dL/dz, whose derivatives the products are; in float16 a multiple of it.
        undifferentiable: why the products have no gradient of their own, if they have none.
    """

    def __init__(self, tail: Tail, *, differentiable: bool) -> None:
        errors.check_differentiable(tail.path)
        self.tail = tail
        self.differentiable = differentiable
        self.uses = tail.uses
        with errors.explained("second derivatives"):
            self._corrections = corrections(tail.path, derivatives_to_come=2)
        self.half = any(
            made.dtype == torch.float16 for node in (*tail.path, *tail.ends) for made in nodes.results(node)
        )
        self._scale = torch.ones_like(tail.loss)
        if self.half:
            self._fit_into_float16()
        self.gradient = self._pull([tail.loss], [self._scale], create_graph=True)
        derivative = errors.check_functions(tail.path, tail.ends, self.gradient)
        self.undifferentiable = errors.undifferentiable(tail.path, derivative) if differentiable else None
        if not differentiable and not tail.nested:
            self.uses = tuple(use.detached() for use in self.uses)

    def _fit_into_float16(self) -> None:
        """Multiplies the loss by a power of two and divides the products by it, so that float16 holds them:
        derivatives of a sure softmax over a batch are below its range.

        The largest entry of the gradient, or of the product with a direction of unit size, becomes about one:
        there is as much room above as below then. Measured without waiting for the device.
        """
        self._scale = torch.full_like(self.tail.loss, 2.0**7)
        self.gradient = self._pull([self.tail.loss], [self._scale], create_graph=True)
        unit = [
            torch.arange(g.numel(), dtype=g.dtype, device=g.device).cos().view_as(g) for g in self.gradient
        ]
        product = self._pull(self.gradient, unit, create_graph=False)
        size = torch.stack([t.detach().abs().max() for t in (*self.gradient, *product)]).max() / self._scale
        # What overflowed is large, what is zero may have underflowed.
        exponent = -size.nan_to_num(nan=torch.inf).log2().ceil()
        self._scale = exponent.clamp(-8, 15).exp2().to(self._scale).expand_as(self._scale)

    def lift(self, matrix: Tensor) -> list[Tensor]:
        """``u = lin(phi; matrix)`` for every use: where W moving along `matrix` ``(d, m)`` moves z."""
        return [use.lift(matrix) for use in self.uses]

    def hvp(self, directions: Sequence[Tensor]) -> list[Tensor]:
        """``Hess_z(L) u`` for one direction u."""
        pulled = self._pull(self.gradient, directions, create_graph=self.differentiable)
        return [p / self._scale for p in pulled] if self.half else pulled

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
        value = value / self._scale
        (product,) = torch.autograd.grad(value, left, create_graph=self.differentiable, retain_graph=True)
        return product

    def quadratic(self, matrix: Tensor) -> Tensor:
        """``<V, H V>``, differentiated through V as well.

        As H is symmetric, the gradient through one of the two V counts twice and the other may be a
        constant, which spares the backward through the product's own argument.
        """
        if self.tail.nested:
            return (doubled(matrix) * self.times(matrix.detach())).sum()
        lifted = self.lift(matrix)
        return inner(list(map(doubled, lifted)), self.hvp([u.detach() for u in lifted]))

    def _pull(
        self, outputs: Sequence[Tensor], weights: Sequence[Tensor], *, create_graph: bool
    ) -> list[Tensor]:
        """Gradient of ``<outputs, weights>`` in z; zero where it does not depend on z."""
        attached = [(o, w) for o, w in zip(outputs, weights, strict=True) if o.requires_grad]
        # A first derivative is differentiated twice more, a second once; but for float16, where torch's own
        # overflow, since they square what they are given; and where one call feeds another, when what is
        # pulled back is a direction that depends on z itself.
        first = outputs[0] is self.tail.loss
        twice = first or self.half or self.tail.nested
        found: Sequence[Tensor | None] = [None] * len(self.uses)
        if attached:
            with (
                corrected(self._corrections, derivatives_to_come=2 if twice else 1),
                errors.explained("second derivatives"),
            ):
                found = torch.autograd.grad(
                    [o for o, _ in attached],
                    self.tail.edges,
                    [w.to(o.dtype) for o, w in attached],
                    create_graph=create_graph,
                    retain_graph=True,
                    allow_unused=True,
                )
        return [
            use.matrix().new_zeros(use.shape) if p is None else at_least_float32(p).reshape(use.shape)
            for p, use in zip(found, self.uses, strict=True)
        ]


def inner(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    """``<left, right>`` over all uses."""
    return torch.stack([(a * b).sum() for a, b in zip(left, right, strict=True)]).sum()
