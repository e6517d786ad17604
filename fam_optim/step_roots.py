"""A of the losses of one step: of its micro-batches, and of the processes that share the batch."""

from __future__ import annotations

import weakref
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch

from fam_optim.estimators.roots import Rows, added, joined, products_of_rows, sample_roots
from fam_optim.graph import nodes
from fam_optim.graph.losses import find_outputs
from fam_optim.graph.reach import reach
from fam_optim.graph.trace import check_scalar
from fam_optim.parallel import Replicas, unsunk

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor
    from torch.autograd.graph import Node

    from fam_optim.estimators.roots import Roots
    from fam_optim.graph.reach import Reach
    from fam_optim.layer.weights import WeightMatrix

_SEEN = "fam_optim.seen"


class Taken:
    """A of one loss, or of several that were backpropagated.

    Attributes:
        roots: A by weight.
        backpropagated: whether the loss's backward has begun.
    """

    def __init__(self, roots: Roots) -> None:
        self.roots, self.backpropagated = roots, False

    def note(self, gradient: Tensor) -> None:
        """Hook on the loss: its backward has begun."""
        self.backpropagated = True


class StepRoots:
    """A of the losses of one step, of all micro-batches and processes.

    Args:
        weights: by number.
        n_samples: signs of a loss.

    Attributes:
        recognised: whether a loss that depends on one of the weights has been seen.
    """

    def __init__(self, weights: Sequence[WeightMatrix], n_samples: int) -> None:
        self.weights, self.n_samples, self.recognised = weights, n_samples, False
        self._replicas = Replicas([w.parameter for w in weights])
        self.forget()

    def forget(self) -> None:
        """Drops what was taken, as after a step."""
        self._taken: list[Taken] = []
        self._generators: dict[torch.device, torch.Generator] = {}

    def gradients_zeroed(self) -> None:
        """Drops whatever was taken with the gradients: it is of a step that was not made."""
        self._taken = self._pending()
        if not self._taken:
            self._generators.clear()

    def _pending(self) -> list[Taken]:
        """What was taken of losses whose backward is still to come."""
        return [taken for taken in self._taken if not taken.backpropagated]

    @property
    def only_pending(self) -> bool:
        """Whether none of the losses that A was taken of has been backpropagated."""
        return bool(self._taken) and len(self._pending()) == len(self._taken)

    def see(self, loss: Tensor, seed: int | None) -> None:
        """Takes A of a loss that is about to be backpropagated, with the signs of a seed; without one it is
        only looked whether the loss can be taken A of.

        Raises:
            RuntimeError: if the loss is not known to be convex in the network's outputs.
        """
        check_scalar(loss)
        reached = reach(loss, [w.parameter for w in self.weights])
        if not reached.leaves:
            return
        ends = frozenset(reached.leaves.values())
        with torch.autocast(loss.device.type, enabled=False), unsunk(reached.path):
            outputs = find_outputs(loss, reached.path | ends, ends, differentiable=False)
            # The square of a weight itself is weight decay, and no output of the network.
            outputs = [o for o in outputs if not all(nodes.is_leaf(edge.node) for edge in o.edges)]
            alone = self._replicas.group is None
            self.recognised = True
            if seed is None or self._is_seen(loss):
                return
            # g has the same size on all processes, however many rows they have.
            rows = self.rows(reached) if alone else {}
            generator = partial(self._generator, seed)
            taken = Taken(sample_roots(reached, outputs, self.weights, rows, generator, self.n_samples))
        loss.register_hook(taken.note)  # type: ignore[no-untyped-call]
        for earlier in self._taken:
            if earlier.backpropagated:  # a micro-batch
                taken.roots = added(earlier.roots, taken.roots, self.weights)
        self._taken = [*self._pending(), taken]

    def rows(self, reached: Reach) -> dict[int, Node]:
        """The products whose rows A is made of, by weight."""
        return products_of_rows(reached, self.weights)

    def _generator(self, seed: int, device: torch.device) -> torch.Generator:
        """Of the step's signs, which differ from process to process."""
        if device not in self._generators:
            seed = (seed + self._replicas.rank) % 2**63
            self._generators[device] = torch.Generator(device).manual_seed(seed)
        return self._generators[device]

    def _is_seen(self, loss: Tensor) -> bool:
        """Whether A was taken before of a loss, or of what it is a multiple of or a sum with.

        By regularize(), of a loss that a closure then backpropagates, scaled perhaps, as Lightning's does.
        """
        stack: list[Any] = [loss.grad_fn]
        while stack:
            node = stack.pop()
            if self in nodes.metadata(node).get(_SEEN, ()):
                return True
            stack.extend(below for below, _ in node.next_functions if below and nodes.is_scalar(below))
        nodes.metadata(cast("Node", loss.grad_fn)).setdefault(_SEEN, weakref.WeakSet()).add(self)
        return False

    def total(self) -> tuple[dict[int, Tensor], set[int]]:
        """A ``(d, q)`` of what was backpropagated, by weight, and the weights whose A is made of rows."""
        roots: Roots = {}
        for taken in self._taken:
            if taken.backpropagated:
                roots = added(roots, taken.roots, self.weights)
        of_rows = {i for i, samples in roots.items() if isinstance(samples[0], Rows)}
        return self._of_all_processes({i: joined(samples) for i, samples in roots.items()}), of_rows

    def _of_all_processes(self, roots: dict[int, Tensor]) -> dict[int, Tensor]:
        """A of the whole batch: zero of a weight that no process uses."""
        if self._replicas.group is None:
            return roots
        zeros = (w.of(w.parameter).new_zeros(w.d, w.m * self.n_samples) for w in self.weights)
        mine = [roots.get(i, zero) for i, zero in enumerate(zeros)]
        return dict(enumerate(self._replicas.joined(mine)))
