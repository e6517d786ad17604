"""Numerical checks that cost no host synchronisation once they have held.

A check is a boolean tensor on the device. The first time, for one kind of tail, it is read, and
callers choose their path by it. From then on it is still made at every call but only asserted on the
device: on the CPU a failure is seen at once and the caller chooses again; an accelerator ends in a
device-side assertion, as it does for an index out of range. So a tail that changes under an
unchanged graph (a coefficient that was zero, an attention mask) is never answered wrongly in silence.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Hashable

    from torch import Tensor

    from fam_optim.tail import Tail

_CAPACITY = 4096
_held: set[Hashable] = set()


def signature(tail: Tail) -> tuple[str, ...]:
    """What is cheap to know of a tail: the operations in it."""
    return tuple(node.name() for node in tail.path)


def has_held(key: Hashable) -> bool:
    """Whether the check `key` has held before."""
    return key in _held


def holds(key: Hashable, check: Tensor) -> bool:
    """Whether `check`, a boolean scalar, is true; waits for the device only if it is new."""
    if key not in _held:
        if not bool(check):
            return False
        if len(_held) >= _CAPACITY:  # graphs that differ at every step would pile up
            _held.clear()
        _held.add(key)
        return True
    try:
        torch._assert_async(check, "fam_optim: what follows the layer changed under the same graph")
    except RuntimeError:
        _held.discard(key)
        return False
    return True
