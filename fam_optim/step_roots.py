"""The root A of a step's curvature, from all its micro-batches and all processes that share the batch."""

from __future__ import annotations

import weakref
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch

from fam_optim import unnoticed
from fam_optim.estimators.roots import added, joined, kept, products_of_rows, sample_roots, scaled
from fam_optim.graph import errors, nodes
from fam_optim.graph.losses import find_outputs
from fam_optim.graph.reach import check_scalar, is_of_weights, reach, spread
from fam_optim.layer.use import at_least_float32
from fam_optim.parallel import Replicas, unsunk
from fam_optim.unnoticed import counted_once, in_full_precision

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor
    from torch.autograd.graph import Node

    from fam_optim.estimators.roots import Roots
    from fam_optim.graph.reach import Reach
    from fam_optim.layer.kinds import WeightMatrix

_SEEN = "fam_optim.seen"
APART = 0x9E3779B97F4A7C15
"""Between the seeds of processes: no difference that their users' own seeds have makes up for it."""


class Taken:
    """A of one loss."""

    def __init__(self, roots: Roots) -> None:
        self.roots = roots
        self.share: Tensor | None = None  # of the loss that was backpropagated: its own gradient

    def note(self, gradient: Tensor) -> None:
        """Hook on the loss: its backward has begun, perhaps once more."""
        gradient = at_least_float32(gradient).reshape(())
        if not unnoticed.reading_waits(gradient) and bool(gradient < 0):  # elsewhere A is nan: no step
            raise RuntimeError(
                "what regularize() returned is backpropagated with a negative factor: the loss is to be "
                "maximised, and is not convex. Regularise what is minimised."
            )
        self.share = gradient if self.share is None else self.share + gradient


class StepRoots:
    """A of the losses of one step, of all micro-batches and processes.

    Attributes:
        recognised: whether a loss that depends on one of the weights has been seen.
    """

    def __init__(self, weights: Sequence[WeightMatrix], n_samples: int) -> None:
        self.weights, self.n_samples, self.recognised = weights, n_samples, False
        self._replicas = Replicas([w.parameter for w in weights])
        self._pending: list[Taken] = []
        self._roots: Roots = {}  # of what was backpropagated
        self.forget()

    def forget(self) -> None:
        """Drops what was taken, as after a step."""
        for taken in self._pending:
            taken.roots = {}  # whoever keeps the loss does not keep A
        self._pending = []
        self._empty()

    def gradients_zeroed(self) -> None:
        """Forgets what was backpropagated: it is of a step that was not made, or will be once more."""
        known, self._pending = [weakref.ref(taken) for taken in self._pending], []
        # The hook of a loss that can still be backpropagated keeps what was taken of it.
        self._pending = [taken for ref in known if (taken := ref()) is not None]
        for taken in self._pending:
            taken.share = None
        self._empty()

    def keep_if(self, left: Tensor | None) -> None:
        """Forgets what was backpropagated if nothing is left of it: no gradients, or zeros in place."""
        if left is None:
            self.gradients_zeroed()
        else:
            self._gather()
            self._roots = kept(self._roots, left)

    def _empty(self) -> None:
        self._roots = {}
        self._shares: list[Tensor] = []
        if not self._pending:
            self._generators: dict[torch.device, torch.Generator] = {}

    def _gather(self) -> None:
        """Adds up A of the losses whose backward has begun, each as much as it was backpropagated."""
        for taken in self._pending:
            if taken.share is not None:
                self._roots = added(self._roots, scaled(taken.roots, taken.share.sqrt()), self.weights)
                self._shares.append(taken.share)
                taken.roots = {}
        self._pending = [taken for taken in self._pending if taken.share is None]

    @property
    def is_empty(self) -> bool:
        """Whether A was taken of no loss."""
        return not (self._pending or self._shares)

    @property
    def only_pending(self) -> bool:
        """Whether none of the losses that A was taken of has been backpropagated."""
        return not self.is_empty and not self._shares and all(t.share is None for t in self._pending)

    def see(self, loss: Tensor, seed: int | None) -> None:
        """Takes A of a loss that is about to be backpropagated, with the signs of a seed; without one it is
        only looked whether the loss can be taken A of, or RuntimeError.
        """
        check_scalar(loss)
        reached = reach(loss, [w.parameter for w in self.weights])
        self._check_graph(reached)
        if not reached.leaves or (seed is not None and self._is_seen(loss)):
            return
        ends = frozenset(reached.leaves.values())
        with in_full_precision(loss.device), unsunk(reached.path), counted_once():
            with errors.explained("the graph"):
                outputs = find_outputs(loss, reached.path | ends, ends, differentiable=False)
            outputs = [o for o in outputs if not all(is_of_weights(edge.node) for edge in o.edges)]
            self._replicas.check_together()
            alone = self._replicas.group is None
            self.recognised = True
            if seed is None:
                return
            self._gather()
            # g has the same size on all processes, however many rows they have.
            rows = self.rows(reached) if alone else {}
            generator = partial(self._generator, seed)
            taken = Taken(sample_roots(reached, outputs, self.weights, rows, generator, self.n_samples))
        loss.register_hook(taken.note)  # type: ignore[no-untyped-call]
        self._pending.append(taken)
        nodes.metadata(cast("Node", loss.grad_fn)).setdefault(_SEEN, weakref.WeakSet()).add(self)

    def _check_graph(self, reached: Reach) -> None:
        """Raises RuntimeError if weights may be used where the graph does not show it, or if something on the
        way to them can be backpropagated through but once."""
        hidden = [w.name for w in self.weights if w.parameter not in reached.leaves]
        if hidden and any(map(nodes.is_reentrant_checkpoint, reached.parents)):
            raise RuntimeError(
                f"the loss does not depend on the weight of `layer` {hidden[0]} outside reentrant activation "
                "checkpoints, and what happens in one is not in the graph. Checkpoint with "
                "use_reentrant=False, or leave the layers in the checkpoint out of `layer`."
            )
        if any(map(nodes.gives_buffers_away, reached.path)):
            raise RuntimeError(
                "mode='proximal' takes two backwards of a due step's loss, and a compiled region in it gives "
                "its buffers away after one, as it was compiled before FAM was built. Call "
                "torch.compiler.reset() after building FAM."
            )

    def rows(self, reached: Reach) -> dict[int, Node]:
        """The products whose rows A is made of, by weight."""
        return products_of_rows(reached, self.weights)

    def _generator(self, seed: int, device: torch.device) -> torch.Generator:
        """Of the step's signs, which differ from process to process."""
        if device not in self._generators:
            seed = (seed + self._replicas.rank * APART) % 2**63
            self._generators[device] = torch.Generator(device).manual_seed(seed)
        return self._generators[device]

    def _is_seen(self, loss: Tensor) -> bool:
        """Whether A was taken before of a loss, or of what it is a multiple of or a sum with.

        By regularize(), of a loss that a closure then backpropagates, scaled perhaps, as Lightning's does.
        """

        def scalars(node: Node) -> set[Any]:
            return {below for below, _ in node.next_functions if below and nodes.is_scalar(below)}

        root = cast("Node", loss.grad_fn)
        return any(self in nodes.metadata(node).get(_SEEN, ()) for node in {root, *spread([root], scalars)})

    def total(self) -> tuple[dict[int, Tensor], set[int]]:
        """A ``(d, q)`` of what was backpropagated, by weight, and the weights whose A is made of rows."""
        self._gather()
        roots = self._roots
        if roots:  # micro-batches count by their shares, but shares above one are a loss scale
            roots = scaled(roots, torch.stack(self._shares).amax().clamp_min(1).rsqrt())
        of_rows = {i for i, samples in roots.items() if samples[0].phi is not None}
        return self._of_all_processes({i: joined(samples) for i, samples in roots.items()}), of_rows

    def _of_all_processes(self, roots: dict[int, Tensor]) -> dict[int, Tensor]:
        """A of the whole batch: zero of a weight that no process uses."""
        if self._replicas.group is None:
            return roots
        zeros = (w.of(w.parameter).new_zeros(w.d, w.m * self.n_samples) for w in self.weights)
        mine = [roots.get(i, zero) for i, zero in enumerate(zeros)]
        return dict(enumerate(self._replicas.joined(mine)))
