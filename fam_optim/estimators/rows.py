"""Rows of a layer's output, and which of them interact in the tail.

A row is one vector that the layer put out: a sample, a token, a position of a convolution. Rows that
do not interact have no mixed second derivatives, so one Hessian-vector product serves all of them.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from fam_optim.estimators.curvature import inner, undifferentiable
from fam_optim.graph import independence, verdicts
from fam_optim.graph.errors import has_no_derivative
from fam_optim.layer.use import LayerUse, at_least_float32

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from fam_optim.estimators.curvature import Curvature
    from fam_optim.graph.trace import Tail
    from fam_optim.layer.use import Use

_generators: dict[torch.device, torch.Generator] = {}


class Grouping:
    """A partition of the rows of all uses into ``groups`` equal groups of ``size`` rows.

    Args:
        uses: the layer's uses.
        axis: the axis of z's rows along which groups lie: 0 (samples), 1 (samples, sequence first);
            "row": every row is a group; None: there is one group.
    """

    def __init__(self, uses: Sequence[LayerUse], axis: int | str | None) -> None:
        self.uses = uses
        self.axis = axis
        counts = [math.prod(use.lead) for use in uses]
        if axis == "row":
            self.groups, self.size = sum(counts), 1
        else:
            self.groups = 1 if axis is None else uses[0].lead[int(axis)]
            self.size = sum(counts) // self.groups
        # The rows of several uses are put side by side: as more groups, or within their group.
        self._side = 0 if axis == "row" else 1

    def gather(self, by_row: Sequence[Tensor]) -> Tensor:
        """One tensor ``(*lead, ...)`` per use, to ``(groups, size, ...)``."""
        return torch.cat([self._split(t, use) for t, use in zip(by_row, self.uses, strict=True)], self._side)

    def scatter(self, grouped: Tensor) -> list[Tensor]:
        """``(groups, size, k)`` to one tensor in z's shape per use, k being 1 or d."""
        shares = [
            self._split(torch.empty(use.lead, device="meta"), use).shape[self._side] for use in self.uses
        ]
        parts = torch.split(grouped, shares, self._side)
        return [self._join(part, use) for part, use in zip(parts, self.uses, strict=True)]

    def gather_outputs(self, outputs: Sequence[Tensor]) -> Tensor:
        """One tensor in z's shape per use, to ``(groups, size, d)``."""
        return self.gather([t.movedim(use.channel, -1) for t, use in zip(outputs, self.uses, strict=True)])

    def squared_norms(self) -> Tensor:
        """``||phi_a||^2`` ``(groups, size)``."""
        return self.gather([use.squared_norms() for use in self.uses])

    def place(self, position: int, v: Tensor) -> list[Tensor]:
        """v ``(d,)`` at one position of every group, zero elsewhere, in z's shape."""
        grouped = v.new_zeros(self.groups, self.size, v.numel())
        grouped[:, position] = v
        return self.scatter(grouped)

    def gram_rows(self) -> Iterator[tuple[int, Tensor]]:
        """For every position a of the groups: a and ``<phi_a, phi_b>`` for all b, ``(groups, size)``."""
        if self.size == 1:
            yield 0, self.squared_norms()
            return
        phi = self.gather([use.rows() for use in self.uses])
        for position in range(self.size):
            yield position, (phi @ phi[:, position, :, None]).squeeze(-1)

    def _split(self, t: Tensor, use: LayerUse) -> Tensor:
        rest = t.shape[len(use.lead) :]
        if self.axis == "row":
            return t.reshape(-1, 1, *rest)
        if self.axis is None:
            return t.reshape(1, -1, *rest)
        return t.movedim(int(self.axis), 0).reshape(self.groups, -1, *rest)

    def _join(self, part: Tensor, use: LayerUse) -> Tensor:
        if self.axis in ("row", None):
            rows = part.reshape(*use.lead, part.shape[-1])
        else:
            axis = int(self.axis)
            lead = list(use.lead)
            del lead[axis]
            rows = part.reshape(self.groups, *lead, part.shape[-1]).movedim(0, axis)
        return rows.movedim(-1, use.channel)


def find_grouping(curvature: Curvature, smaller_than: int, *, insist: bool = False) -> Grouping | None:
    """The finest grouping, in groups smaller than `smaller_than`, whose groups do not interact.

    With `insist`, groups that were found to interact before are looked at again.

    Cost: nothing where the graph shows it; else two or three Hessian-vector products, not differentiated,
    per grouping tried.
    """
    uses = row_uses(curvature.tail, curvature.uses)
    if uses is None:
        return None
    axes: list[int | str | None] = ["row", None]
    for axis in (1, 0):
        lengths = {use.lead[axis] if axis < len(use.lead) else 0 for use in uses}
        if len(lengths) == 1 and 0 not in lengths:
            axes.insert(1, axis)
    groupings = sorted((Grouping(uses, axis) for axis in axes), key=lambda grouping: grouping.size)
    for grouping in groupings:
        if grouping.size < smaller_than and (
            shown_independent(curvature, grouping) or _tested_independent(curvature, grouping, insist=insist)
        ):
            return grouping
    return None


def shown_rows(curvature: Curvature) -> Grouping | None:
    """Every row as a group of its own, if the graph shows that rows do not interact."""
    uses = row_uses(curvature.tail, curvature.uses)
    if uses is None:
        return None
    rows = Grouping(uses, "row")
    return rows if shown_independent(curvature, rows) else None


def row_uses(tail: Tail, uses: Sequence[Use]) -> list[LayerUse] | None:
    """The uses of the tail's layer, if each output vector belongs to one input vector."""
    of_rows = [use for use in uses if isinstance(use, LayerUse) and use.has_rows]
    return None if len(of_rows) < len(uses) or tail.nested else of_rows


def in_order(uses: Sequence[LayerUse], axis: int | str | None) -> bool:
    """Whether the groups along `axis` are runs of z: of one use its rows, if the channels come last, or what
    the first axis counts."""
    channels = [use.channel % len(use.shape) for use in uses]
    if axis == "row":
        return len(uses) == 1 and channels[0] == len(uses[0].shape) - 1
    return axis == 0 and 0 not in channels


def shown_independent(curvature: Curvature, grouping: Grouping) -> bool:
    """Whether the graph shows that groups do not interact; one group has nothing to interact with."""
    if grouping.groups == 1:
        return True
    tail = curvature.tail
    runs = in_order(grouping.uses, grouping.axis)
    return runs and independence.independent(frozenset(tail.path), tail.ends, grouping.groups)


def _tested_independent(curvature: Curvature, grouping: Grouping, *, insist: bool) -> bool:
    """Whether groups do not interact, by numbers: scaling a direction group by group scales the product
    likewise.

    For a random q and scales e, different for any two groups, this holds exactly if they do not, and else
    only by accident. The scales are powers of two, with which floating-point arithmetic commutes, so the
    two sides are compared to rounding. A new verdict also takes that the derivatives of the two sides agree
    (a coupling that happens to be zero has none the less a gradient), and what a kernel that never gives the
    same number twice is off by.

    Cost: two Hessian-vector products, not differentiated, or three for more than 64 groups; none where
    groups are known to interact.
    """
    tail = curvature.tail
    key = verdicts.signature(tail, "groups", grouping.axis, curvature.differentiable)

    def check(new: bool) -> Tensor:
        q = [_normal_like(g) for g in curvature.gradient]
        product = curvature.hvp(q, constant=True)
        size = _largest(product)
        # float16 ends early, and below its normal range scaling rounds.
        exponents, precision = (8, torch.float16) if curvature.half else (64, q[0].dtype)
        tolerance = 8 * torch.finfo(precision).eps * size
        if new:
            again = curvature.hvp(q, constant=True)
            tolerance = tolerance + 8 * _largest([a - b for a, b in zip(again, product, strict=True)])
        same = torch.ones_like(size, dtype=torch.bool)
        for scales in _scales(grouping, q[0], exponents):
            scaled = curvature.hvp([e * u for e, u in zip(scales, q, strict=True)], constant=True)
            for e, s, h in zip(scales, scaled, product, strict=True):
                same = same & ((s / e - h).abs().max() <= tolerance)
        # Not in float16, whose third derivatives are too coarse to compare.
        if new and curvature.differentiable and not curvature.half and undifferentiable(tail) is None:
            same = same & _same_derivatives(curvature, grouping, q)
        return verdicts.outcome(same, torch.isfinite(size))

    return verdicts.of(tail.layer).holds(key, check, insist=insist)


def _largest(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack([t.abs().max() for t in tensors]).max()


def _scales(grouping: Grouping, like: Tensor, exponents: int) -> Iterator[list[Tensor]]:
    """Powers of two by group, in rounds of which at least one tells any two groups apart."""
    index = torch.arange(grouping.groups, device=like.device)
    rounds = 1
    while exponents**rounds < grouping.groups:
        rounds += 1
    for digit in range(rounds):
        by_group = torch.exp2((index // exponents**digit % exponents).to(like.dtype))
        yield grouping.scatter(by_group[:, None, None].expand(-1, grouping.size, 1))


def _same_derivatives(curvature: Curvature, grouping: Grouping, q: list[Tensor]) -> Tensor:
    """Whether the test's two sides have the same derivatives in all that enters the tail, if finite ones."""
    like = curvature.gradient[0]
    weights = [_normal_like(g) for g in curvature.gradient]
    same = torch.ones((), dtype=torch.bool, device=like.device)
    try:
        expected = _derivatives(curvature, inner(weights, curvature.hvp(q)))
        again = _derivatives(curvature, inner(weights, curvature.hvp(q)))
        size = _largest(expected)
        tolerance = 64 * torch.finfo(like.dtype).eps * size
        tolerance = tolerance + 8 * _largest([a - b for a, b in zip(again, expected, strict=True)])
        for scales in _scales(grouping, like, 16):
            scaled = curvature.hvp([e * u for e, u in zip(scales, q, strict=True)])
            back = [s / e for s, e in zip(scaled, scales, strict=True)]
            actual = _derivatives(curvature, inner(weights, back))
            for a, b in zip(actual, expected, strict=True):
                same = same & ((a - b).abs().max() <= tolerance)
        return same | ~torch.isfinite(size)
    except RuntimeError as error:
        if not has_no_derivative(error):
            raise
        return same  # torch has no third derivative here: the penalty's backward will say so


def _derivatives(curvature: Curvature, value: Tensor) -> list[Tensor]:
    """The gradient in everything that enters the tail: the layer's outputs, parameters, side branches."""
    nothing = value.new_zeros(1)
    edges = curvature.tail.inputs if value.requires_grad else []
    found = torch.autograd.grad(value, edges, retain_graph=True, allow_unused=True) if edges else ()
    return [nothing, *(nothing if g is None else at_least_float32(g) for g in found)]


def _normal_like(t: Tensor) -> Tensor:
    """Normal numbers, from a generator of our own: checks must not advance the user's."""
    if t.device not in _generators:
        _generators[t.device] = torch.Generator(t.device).manual_seed(0)
    return torch.randn(t.shape, dtype=t.dtype, device=t.device, generator=_generators[t.device])
