"""Numerical checks that cost no host synchronisation once they have been made.

A check is a boolean tensor on the device. The first time, for one kind of tail, it is read, and
callers choose their path by it. Where it failed, the path that needs no check is taken from then on.
Where it held, it is still made at every call, but only asserted on the device: on the CPU a failure is
seen at once and the caller chooses again; an accelerator ends in a device-side assertion, as it does
for an index out of range. So a tail that changes under an unchanged graph (a coefficient that was
zero, an attention mask) is never answered wrongly in silence. (Where a check costs as much as what it
guards, it is made again now and then only, see `due`.)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Hashable

    from torch import Tensor

    from fam_optim.tail import Tail

_CAPACITY = 4096
_verdicts: dict[Hashable, bool] = {}
_skipped: dict[Hashable, int] = {}


def signature(tail: Tail) -> tuple[tuple[str, bool], ...]:
    """What is cheap to know of a tail: its operations, and which of them are in train mode."""
    return tuple((node.name(), getattr(node, "_saved_training", False)) for node in tail.path)


def verdict(key: Hashable) -> bool | None:
    """How the check `key` ended before; None if it was never made."""
    return _verdicts.get(key)


def due(key: Hashable, every: int) -> bool:
    """Whether to make the check `key` now: at first, and then at every `every`-th call."""
    count = _skipped.get(key, 0) if _verdicts.get(key, False) else every - 1
    _skipped[key] = (count + 1) % every
    return _skipped[key] == 0


def holds(key: Hashable, check: Tensor) -> bool:
    """Whether `check`, a boolean scalar, is true; waits for the device only if it is new."""
    if not _verdicts.get(key, False):
        return remember(key, bool(check))
    try:
        torch._assert_async(check, "fam_optim: what follows the layer changed under the same graph")
    except RuntimeError:
        return remember(key, False)
    return True


def remember(key: Hashable, verdict: bool) -> bool:
    """`verdict`, from now on that of `key`."""
    if len(_verdicts) >= _CAPACITY:  # graphs that differ at every step would pile up
        _verdicts.clear()
        _skipped.clear()
    _verdicts[key] = verdict
    return verdict
