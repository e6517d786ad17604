"""Rows of a layer's output, and which of them interact in the tail.

A row is one vector that the layer put out: a sample, a token, a position of a convolution. Rows that
do not interact have no mixed second derivatives, so one Hessian-vector product serves all of them.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from fam_optim.layer import LayerUse
from fam_optim.verdicts import has_held, holds, signature

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from fam_optim.curvature import Curvature

_EXPONENTS = 16
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

    def place(self, position: int, v: Tensor) -> list[Tensor]:
        """v ``(d,)`` at one position of every group, zero elsewhere, in z's shape."""
        grouped = v.new_zeros(self.groups, self.size, v.numel())
        grouped[:, position] = v
        return self.scatter(grouped)

    def gram_rows(self) -> Iterator[tuple[int, Tensor]]:
        """For every position a of the groups: a and ``<phi_a, phi_b>`` for all b, ``(groups, size)``."""
        if self.size == 1:
            yield 0, self.gather([use.squared_norms() for use in self.uses])
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


def find_grouping(curvature: Curvature, smaller_than: int) -> Grouping | None:
    """The finest grouping, in groups smaller than `smaller_than`, whose groups do not interact.

    Cost: two Hessian-vector products, not differentiated, per grouping tried.
    """
    uses = [use for use in curvature.uses if isinstance(use, LayerUse) and use.has_rows]
    if len(uses) < len(curvature.uses) or curvature.tail.nested:
        return None
    axes: list[int | str | None] = ["row", None]
    for axis in (1, 0):
        if len({use.lead[axis] if axis < len(use.lead) else None for use in uses} - {None}) == 1 and all(
            axis < len(use.lead) for use in uses
        ):
            axes.insert(1, axis)
    tail = signature(curvature.tail)
    groupings = [Grouping(uses, axis) for axis in axes]
    # A grouping that is known to hold comes before finer ones that are known or likely not to.
    groupings.sort(key=lambda g: (g.size, not has_held((tail, g.axis))))
    for grouping in groupings:
        if grouping.size >= smaller_than:
            continue
        if grouping.groups == 1:
            return grouping
        key = (tail, grouping.axis)
        if holds(key, independent(curvature, grouping, thoroughly=not has_held(key))):
            return grouping
    return None


def independent(curvature: Curvature, grouping: Grouping, *, thoroughly: bool) -> Tensor:
    """Whether scaling a direction group by group scales the Hessian-vector product likewise.

    For random q and scales e this holds exactly if groups do not interact, and else only by accident.
    The scales are powers of two, which floating-point arithmetic commutes with, so the two sides are
    compared to rounding. Two groups that got the same scale are not told apart: `thoroughly` gives
    every two groups different scales in one of ``log_16(groups)`` rounds, otherwise one round is random.
    """
    like = curvature.gradient[0]
    generator = _generator(like.device)
    q = [
        torch.randn(g.shape, generator=generator, device=like.device, dtype=like.dtype)
        for g in curvature.gradient
    ]
    product = curvature.hvp(q, constant=True)
    size = torch.stack([h.abs().max() for h in product]).max()
    tolerance = 8 * torch.finfo(like.dtype).eps * size
    index = torch.arange(grouping.groups, device=like.device)
    rounds = []
    if thoroughly:
        for digit in range(max(1, math.ceil(math.log(grouping.groups, _EXPONENTS)))):
            rounds.append(index // _EXPONENTS**digit % _EXPONENTS)
    else:
        rounds.append(torch.randint(0, _EXPONENTS, index.shape, generator=generator, device=like.device))
    verdict = torch.ones((), dtype=torch.bool, device=like.device)
    for exponents in rounds:
        scale = torch.exp2(exponents.to(like.dtype))[:, None, None].expand(-1, grouping.size, 1)
        scales = grouping.scatter(scale)
        scaled = curvature.hvp([e * u for e, u in zip(scales, q, strict=True)], constant=True)
        for e, s, h in zip(scales, scaled, product, strict=True):
            verdict = verdict & ((s / e - h).abs().max() <= tolerance)
    return verdict | ~torch.isfinite(size)  # a batch that ends in NaN says nothing


def _generator(device: torch.device) -> torch.Generator:
    """A generator of our own: checks must not advance the user's random numbers."""
    if device not in _generators:
        _generators[device] = torch.Generator(device).manual_seed(0)
    return _generators[device]
