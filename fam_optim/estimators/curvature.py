"""Second derivatives of a loss along directions of a weight are taken at the layer's outputs.

A layer is linear in its weight, so moving W along V moves its output z by ``u = lin(phi; V)``. Therefore

    <V, H V> = <u, Hess_z(L) u>

needs only the tail (what lies between z and the loss), not what lies below the layer. Where one call of the
layer feeds another, phi also moves with V. The second derivative of z, times dL/dz, is then added.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fam_optim.estimators.measure import doubled
from fam_optim.graph import errors, nodes
from fam_optim.graph.corrections import corrected, corrections
from fam_optim.graph.trace import Tail
from fam_optim.layer.use import Use, at_least_float32


class Curvature:
    """Multiplies vectors by the Hessian of the loss in a layer's outputs z, lists of one tensor per use.
    Cost: one tail backward to construct, about two more per product (four if `differentiable`)."""

    def __init__(self, tail: Tail, *, differentiable: bool) -> None:
        self.tail = tail if differentiable or tail.nested else tail.detached()
        self.differentiable = differentiable
        self._corrections = corrections(tail.path, derivatives_to_come=2)
        self.half = any(
            made.dtype == torch.float16 for node in (*tail.path, *tail.ends) for made in nodes.results(node)
        )
        self._scale = self._into_float16() if self.half else torch.ones_like(tail.loss)
        # dL/dz times the scale; the products are its derivatives.
        self.gradient = self._pull([tail.loss], [self._scale], create_graph=True)
        derivative = errors.check_functions(tail.path, tail.ends, self.gradient)
        self.undifferentiable = errors.undifferentiable(tail.path, derivative) if differentiable else None

    def _into_float16(self) -> Tensor:
        """Returns a power of two to multiply the loss by, so that derivatives stay within float16's range.
        (Those of a confident softmax over a batch are too small for it.) It makes the largest entry of the
        gradient, or of its product with a direction of unit size, about 1. Nothing waits for the device."""
        scale = torch.full_like(self.tail.loss, 2.0**7)
        gradient = self._pull([self.tail.loss], [scale], create_graph=True)
        unit = [torch.arange(g.numel(), device=g.device).to(g).cos().view_as(g) for g in gradient]
        product = self._pull(gradient, unit, create_graph=False)
        size = torch.stack([t.detach().abs().max() for t in (*gradient, *product)]).max() / scale
        # An overflow counts as a large size; a zero may be an underflow, so it counts as a small one.
        exponent = -size.nan_to_num(nan=torch.inf).log2().ceil()
        return exponent.clamp(-8, 15).exp2().to(scale).expand_as(scale)

    def hvp(self, directions: Sequence[Tensor]) -> list[Tensor]:
        """Returns the Hessian-vector product ``Hess_z(L) u`` of one direction u."""
        pulled = self._pull(self.gradient, directions, create_graph=self.differentiable)
        return [p / self._scale for p in pulled] if self.half else pulled

    def times(self, matrix: Tensor) -> Tensor:
        """Returns ``H V`` ``(d, m)``, the product in weight space, through all uses of the weight."""
        nested = self.tail.nested
        left = torch.zeros_like(matrix, requires_grad=True)
        at_left, at_right = ([use.lift(v) for use in self.tail.uses] for v in (left, matrix))
        # <left, H V> as a function of left; its gradient is H V.
        moved = self._pull(self.gradient, at_right, create_graph=self.differentiable or nested)
        value = inner(at_left, moved)
        if nested:
            for u, v in ((at_left, at_right), (at_right, at_left)):
                value = value + inner(u, self._pull(v, self.gradient, create_graph=True))
        value = value / self._scale
        (product,) = torch.autograd.grad(value, left, create_graph=self.differentiable, retain_graph=True)
        return product

    def quadratic(self, matrix: Tensor) -> Tensor:
        """Returns ``<V, H V>``, differentiable through V as well. H is symmetric, so one V carries twice its
        gradient and the other is a constant. This saves the backward through the argument of the product."""
        if self.tail.nested:
            return (doubled(matrix) * self.times(matrix.detach())).sum()
        lifted = [use.lift(matrix) for use in self.tail.uses]
        return inner(list(map(doubled, lifted)), self.hvp([u.detach() for u in lifted]))

    def _pull(
        self, outputs: Sequence[Tensor], weights: Sequence[Tensor], *, create_graph: bool
    ) -> list[Tensor]:
        """Returns the gradient of ``<outputs, weights>`` in z; zero where it does not depend on z."""
        attached = [o for o in outputs if o.requires_grad]
        vectors = [w.to(o.dtype) for o, w in zip(outputs, weights, strict=True) if o.requires_grad]
        # A first derivative is differentiated twice more, a second derivative once more. Two are assumed also
        # in float16, where torch's own derivatives overflow because they square their input, and where one
        # call feeds another, since the direction that is pulled back then depends on z itself.
        more = 2 if outputs[0] is self.tail.loss or self.half or self.tail.nested else 1
        z = self.tail.edges
        with corrected(self._corrections, derivatives_to_come=more), errors.explained("second derivatives"):
            found = torch.autograd.grad(
                attached, z, vectors, create_graph=create_graph, retain_graph=True, allow_unused=True
            )
        return [as_output(p, use) for p, use in zip(found, self.tail.uses, strict=True)]


def as_output(derivative: Tensor | None, use: Use) -> Tensor:
    """Returns a derivative in z in z's shape and at least float32; zeros where there is none."""
    if derivative is None:
        return use.matrix().new_zeros(use.shape)
    return at_least_float32(derivative).reshape(use.shape)


def inner(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    """Returns the inner product ``<left, right>``, summed over all uses."""
    return torch.stack([(a * b).sum() for a, b in zip(left, right, strict=True)]).sum()
