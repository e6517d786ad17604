"""What numerical checks found, remembered for one layer and one kind of tail.

A check is an integer on the device: `DIFFERS`, `SAME`, or `UNKNOWN` where the batch was not finite, of
which nothing is remembered. It is made at every evaluation, so a tail that changes under an unchanged
graph (a coefficient that was zero, an attention mask) is seen. On the CPU it is read at once. On an
accelerator reading waits for the device, so only a new check is read at once; one that held before is
copied to the host meanwhile and read at the next evaluation, which says so if it failed.

A layer's memory dies with the layer. A kind of tail is its operations with their shapes, axes and modes.
A check that failed is tried again now and then: the slow way that is taken meanwhile is right as well.
"""

from __future__ import annotations

import hashlib
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

from fam_optim.graph import flags, nodes
from fam_optim.layer.use import describe

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

    from torch import Tensor, nn

    from fam_optim.graph.trace import Tail

DIFFERS, SAME, UNKNOWN = 0, 1, 2
RETRIED_EVERY = 64
"""Evaluations after which a check that failed is tried again."""
CAPACITY = 256
"""Kinds of tails remembered for one layer; the oldest makes room."""

_memories: Any = WeakIdKeyDictionary()  # by identity: tensors compare entry by entry


def of(layer: nn.Module | Tensor) -> Verdicts:
    """What is remembered of the tails of `layer`."""
    memory: Verdicts | None = _memories.get(layer)
    if memory is None:
        memory = _memories[layer] = Verdicts(describe(layer))
    return memory


def signature(tail: Tail, *about: Hashable) -> bytes:
    """The kind of `tail`, and what is asked about it, in 16 bytes."""
    described = (
        about,
        [(use.shape, use.weight.shape, use.weight.dtype) for use in tail.uses],
        [
            (node.name(), nodes.settings(node), [(tuple(r.shape), r.dtype) for r in nodes.results(node)])
            for node in tail.path
        ],
    )
    return hashlib.blake2b(repr(described).encode(), digest_size=16).digest()


def outcome(same: Tensor, finite: Tensor | None = None) -> Tensor:
    """The check that `same` is true, undecided unless `finite`."""
    decided = same.to(torch.uint8)
    return decided if finite is None else torch.where(finite, decided, UNKNOWN)


class Verdicts:
    """How checks of one layer's tails ended."""

    def __init__(self, layer: str) -> None:
        self.layer = layer
        self._entries: dict[bytes, _Entry] = {}

    def holds(self, key: bytes, check: Callable[[bool], Tensor], *, insist: bool = False) -> bool:
        """Whether `check` ends in SAME (or UNKNOWN).

        Args:
            key: the `signature` of what is checked.
            check: makes the check; called with True if it is new, when it may look more closely.
            insist: check anew even if it failed before.
        """
        entry = self._entries.get(key)
        if entry is not None and not entry.holds and not insist:
            entry.age += 1
            if entry.age < RETRIED_EVERY:
                return False
        if entry is None or not entry.holds or self._failed_meanwhile(entry):
            return self._decide(key, check)
        now = check(False)
        if flags.reading_waits(now):
            entry.watch(now)
            return True
        return int(now) != DIFFERS or self._decide(key, check)

    def known(self, key: bytes) -> bool | None:
        """How `key` ended; None if nothing is remembered."""
        entry = self._entries.get(key)
        return None if entry is None else entry.holds

    def remember(self, key: bytes, verdict: bool) -> None:
        """Notes how `key` ended."""
        self._entries.pop(key, None)
        while len(self._entries) >= CAPACITY:
            del self._entries[next(iter(self._entries))]
        self._entries[key] = _Entry(verdict)

    def _decide(self, key: bytes, check: Callable[[bool], Tensor]) -> bool:
        decided = int(check(True))
        if decided != UNKNOWN:
            self.remember(key, decided == SAME)
        return decided != DIFFERS

    def _failed_meanwhile(self, entry: _Entry) -> bool:
        if not entry.failed():
            return False
        warnings.warn(
            f"the last kappa of `layer` {self.layer} was not exact: what follows the layer had changed in "
            "its numbers, under the same graph, so that rows interact which did not before. From now on this "
            "is taken into account.",
            stacklevel=2,
        )
        return True


class _Entry:
    """A verdict, and on an accelerator what later checks said, on its way to the host."""

    def __init__(self, holds: bool) -> None:
        self.holds = holds
        self.age = 0
        self._later: Tensor | None = None
        self._host: flags.AsyncFlag | None = None

    def watch(self, check: Tensor) -> None:
        """Keeps a check whose result nobody has waited for."""
        same = check != DIFFERS
        self._later = same if self._later is None else self._later & same
        self._host = flags.AsyncFlag(self._later)

    def failed(self) -> bool:
        """Whether a check that is known by now has failed."""
        return self._host is not None and self._host.read() is False
