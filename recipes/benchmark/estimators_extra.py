"""Estimators of kappa beside the library's, for comparison: ways to choose the probes of a trace.

``kappa = <F F^T, T>`` is the trace of ``B = F^T Hess F``. A *space* says which B:

    weight   one matrix, of the columns of V = F Z: ``(k m, k m)``
    row      one matrix ``(k, k)`` per row a of z, ``||phi_a||^2 F^T Hess_{z_a} F``: one Hessian-vector
             product multiplies each with a vector of its own (where rows do not interact)

with F = W, or, "singular", F = W Q with Q ``(m, r)`` the right singular vectors of W: then F F^T and its
derivative stay (Q Q^T is the identity on W's rows), and B has its weight in few entries of its diagonal,
of which signs have no error. A *scheme* says which vectors, n products in all:

    signs        independent signs
    orthogonal   signs, orthogonal to each other: columns of a Hadamard matrix, drawn without replacement,
                 times one vector of signs
    split        as Hutch++ (Meyer et al. 2021): exact on the range of a sketch of n // 3 products, signs in
                 what is orthogonal to it; n // 3 of the products are not differentiated
    leading      exact on the n // 2 leading singular directions, signs in the others: a sketch for free
    structured   weight space: Z = D H D' instead of independent signs, with H a Hadamard matrix and D, D'
                 diagonal signs; F Z takes m log m multiplications per row of F instead of m^2

Antithetic probes are of no use: v and -v give the same quadratic form.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor


@dataclass(frozen=True)
class Forward:
    """A loss, the input phi ``(N, m)`` and output z ``(N, d)`` of its linear layer, and W ``(d, m)``."""

    loss: Tensor
    phi: Tensor
    z: Tensor
    weight: Tensor


class Space:
    """A symmetric operator B in so many groups of so many columns, whose trace is kappa.

    Attributes:
        groups, columns: B is block diagonal, ``groups`` times ``(columns, columns)``.
        gradient: dL/dz.
    """

    groups: int
    columns: int

    def __init__(self, forward: Forward) -> None:
        self.forward = forward
        (self.gradient,) = torch.autograd.grad(forward.loss, forward.z, create_graph=True)

    def move(self, p: Tensor) -> Tensor:
        """Where z moves along p ``(groups, columns)``: ``(N, d)``, attached to what it is made of."""
        raise NotImplementedError

    def pull(self, moved: Tensor) -> Tensor:
        """The adjoint of `move`, constant."""
        raise NotImplementedError

    def quadratic(self, p: Tensor) -> Tensor:
        """``sum_g <p_g, B_g p_g>``, differentiable: one factor is a constant, the other counts twice."""
        moved = self.move(p)
        constant = moved.detach()
        return ((2 * moved - constant) * self._product(constant, create_graph=True)).sum()

    def times(self, p: Tensor) -> Tensor:
        """``B_g p_g`` ``(groups, columns)``, constant."""
        return self.pull(self._product(self.move(p).detach(), create_graph=False))

    def _product(self, direction: Tensor, *, create_graph: bool) -> Tensor:
        (product,) = torch.autograd.grad(
            self.gradient, self.forward.z, direction, create_graph=create_graph, retain_graph=True
        )
        return product


class Rows(Space):
    """Every row of z has a block of its own."""

    def __init__(self, forward: Forward, *, singular: bool = False) -> None:
        super().__init__(forward)
        self.factor = forward.weight
        if singular:
            _, _, basis = torch.linalg.svd(forward.weight.detach(), full_matrices=False)
            self.factor = forward.weight @ basis.T
        self.groups, self.columns = len(forward.z), self.factor.shape[1]
        self.norms = forward.phi.square().sum(1, keepdim=True).sqrt()

    def move(self, p: Tensor) -> Tensor:
        return self.norms * (p @ self.factor.T)

    def pull(self, moved: Tensor) -> Tensor:
        return ((self.norms * moved) @ self.factor).detach()


class Weights(Space):
    """One block: directions ``V = F Z`` of the weight."""

    def __init__(self, forward: Forward) -> None:
        super().__init__(forward)
        self.m = forward.weight.shape[1]
        self.groups, self.columns = 1, self.m * self.m

    def move(self, p: Tensor) -> Tensor:
        return self.forward.phi @ (self.forward.weight @ p.view(self.m, self.m)).T

    def pull(self, moved: Tensor) -> Tensor:
        return (self.forward.weight.T @ (moved.T @ self.forward.phi)).detach().view(1, -1)


def signs(space: Space, n: int) -> Tensor:
    """Independent signs."""
    return torch.stack([space.quadratic(_signs(space)) for _ in range(n)]).mean()


def orthogonal(space: Space, n: int) -> Tensor:
    """Orthogonal signs; n of all columns of the Hadamard matrix, drawn without replacement."""
    columns = hadamard(_power_of_two(space.columns))
    drawn = columns[torch.randperm(len(columns))[:n], : space.columns]
    diagonal = _signs(space)
    return torch.stack([space.quadratic(diagonal * column) for column in drawn]).mean()


def split(space: Space, n: int) -> Tensor:
    """Exact on a sketched range, signs beside it. The range is a constant: for any, the parts add up to B."""
    size = n // 3
    sketch = torch.stack([space.times(_signs(space)) for _ in range(size)], dim=2)
    basis, _ = torch.linalg.qr(sketch)  # (groups, columns, size)
    return _exact_on(space, basis) + _signs_beside(space, basis, n - 2 * size)


def leading(space: Space, n: int) -> Tensor:
    """Exact on the leading columns of F, signs on the others."""
    size = min(n // 2, space.columns)
    basis = torch.eye(space.columns)[:, :size].expand(space.groups, -1, -1)
    return _exact_on(space, basis) + _signs_beside(space, basis, n - size)


def structured(space: Space, n: int) -> Tensor:
    """``Z = D H D'`` in weight space; independent for every product."""
    assert isinstance(space, Weights)
    size = _power_of_two(space.m)
    values = []
    for _ in range(n):
        left, right = (torch.randint(0, 2, (space.m, 1)) * 2.0 - 1 for _ in range(2))
        columns = torch.randperm(size)[: space.m]
        z = left * hadamard(size)[: space.m, columns] * right.T
        values.append(space.quadratic(z.reshape(1, -1)))
    return torch.stack(values).mean()


def _exact_on(space: Space, basis: Tensor) -> Tensor:
    return torch.stack([space.quadratic(vector) for vector in basis.unbind(2)]).sum()


def _signs_beside(space: Space, basis: Tensor, n: int) -> Tensor:
    values = []
    for _ in range(n):
        probe = _signs(space)
        inside = (basis * (basis.transpose(1, 2) @ probe[..., None]).transpose(1, 2)).sum(2)
        values.append(space.quadratic(probe - inside))
    return torch.stack(values).mean()


def _signs(space: Space) -> Tensor:
    return torch.randint(0, 2, (space.groups, space.columns)) * 2.0 - 1


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


@cache
def hadamard(n: int) -> Tensor:
    """The Hadamard matrix of a power of two: signs, with orthogonal columns."""
    return torch.ones(1, 1) if n == 1 else torch.kron(torch.tensor([[1.0, 1], [1, -1]]), hadamard(n // 2))


@dataclass(frozen=True)
class Estimator:
    """A scheme in a space.

    Attributes:
        fewest: the smallest number of products that it makes sense with.
    """

    space: Callable[[Forward], Space]
    scheme: Callable[[Space, int], Tensor]
    fewest: int = 1

    def run(self, forward: Forward, n: int) -> Tensor:
        """The estimate with n products, ``()``, differentiable."""
        return self.scheme(self.space(forward), n)

    def possible(self, forward: Forward, n: int) -> bool:
        """Whether so many products are enough, and not more than the exact value takes."""
        return self.fewest <= n <= min(forward.weight.shape)


def singular(forward: Forward) -> Rows:
    """Rows, in W's singular directions."""
    return Rows(forward, singular=True)


ESTIMATORS = {
    "weight, signs": Estimator(Weights, signs),
    "weight, structured": Estimator(Weights, structured),
    "weight, split": Estimator(Weights, split, fewest=3),
    "row, signs": Estimator(Rows, signs),
    "row, orthogonal": Estimator(Rows, orthogonal, fewest=2),
    "row, split": Estimator(Rows, split, fewest=3),
    "row, singular signs": Estimator(singular, signs),
    "row, singular orthogonal": Estimator(singular, orthogonal, fewest=2),
    "row, singular leading": Estimator(singular, leading, fewest=2),
}
