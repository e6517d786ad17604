"""Collects the root A of a step's curvature over all micro-batches of the step and all processes."""

import weakref
from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.graph import Node

from fam_optim import unnoticed
from fam_optim.estimators.roots import Roots, added, products_of_rows, sample_roots
from fam_optim.graph import nodes
from fam_optim.graph.losses import find_outputs
from fam_optim.graph.reach import Reach, reach, spread
from fam_optim.layer.kinds import WeightMatrix
from fam_optim.layer.use import at_least_float32
from fam_optim.parallel import Replicas, unsunk
from fam_optim.unnoticed import counted_once

_SEEN = "fam_optim.seen"
APART = 0x9E3779B97F4A7C15  # keeps the seeds of processes far apart, whatever seeds the user chose


class Taken:
    """The roots A taken from one loss, with the share of that loss which was backpropagated."""

    def __init__(self, roots: Roots) -> None:
        self.roots = roots
        self.share: Tensor | None = None  # the gradient that the loss got; None before its backward

    def note(self, gradient: Tensor) -> None:
        """Hook on the loss: adds the gradient with which a backward of the loss begins."""
        gradient = at_least_float32(gradient).reshape(())
        if not unnoticed.reading_waits(gradient) and bool(gradient < 0):  # on an accelerator A becomes nan
            raise RuntimeError(
                "what regularize() returned is backpropagated with a negative factor: the loss is to be "
                "maximised, and is not convex. Regularise what is minimised."
            )
        self.share = gradient if self.share is None else self.share + gradient


class StepRoots:
    """Takes A from the losses of one step and adds it up over micro-batches and processes."""

    def __init__(self, weights: Sequence[WeightMatrix], n_samples: int) -> None:
        self.weights, self.n_samples = weights, n_samples
        self.recognised = False  # whether a loss that depends on one of the weights has been seen
        self._replicas = Replicas([w.parameter for w in weights])
        self._pending: list[Taken] = []
        self.forget()

    def forget(self) -> None:
        """Drops everything that was taken; called after a step."""
        for taken in self._pending:
            taken.roots = {}  # a user who keeps the loss does not keep A alive
        self._pending = []
        self.gradients_zeroed()

    def gradients_zeroed(self) -> None:
        """Forgets which losses were backpropagated, since their gradients are gone."""
        known, self._pending = [weakref.ref(taken) for taken in self._pending], []
        # Only the hook of a loss that can still be backpropagated keeps its `Taken` alive.
        self._pending = [taken for ref in known if (taken := ref()) is not None]
        for taken in self._pending:
            taken.share = None
        self._roots: Roots = {}  # the sum of A over the losses that were backpropagated
        self._shares: list[Tensor] = []
        if not self._pending:
            self._generators: dict[torch.device, torch.Generator] = {}

    def keep_if(self, left: Tensor | None) -> None:
        """Forgets what was backpropagated if `left` says that all its gradients are zero or gone."""
        if left is None:
            self.gradients_zeroed()
        else:
            self._gather()
            self._roots = {i: root.kept_if(left) for i, root in self._roots.items()}
            self._shares = [torch.where(left.to(share.device), share, 0) for share in self._shares]

    def _gather(self) -> None:
        """Adds up A of the losses whose backward has begun, each times the root of its share."""
        for taken in self._pending:
            if taken.share is not None:
                self._roots = added(self._roots, taken.roots, taken.share.sqrt())
                self._shares.append(taken.share)
                taken.roots = {}
        self._pending = [taken for taken in self._pending if taken.share is None]

    @property
    def only_pending(self) -> bool:
        """Whether A was taken from losses of which none has been backpropagated."""
        return bool(self._pending) and not self._shares and all(t.share is None for t in self._pending)

    def see(self, loss: Tensor, seed: int | None) -> None:
        """Takes A from a loss before its backward, with signs of `seed`; if this is None only checks it."""
        reached = reach(loss, [w.parameter for w in self.weights])
        self._check_graph(reached)
        if not reached.leaves or (seed is not None and self._is_seen(loss)):
            return
        ends = frozenset(reached.leaves.values())
        with unsunk(reached.path), counted_once():
            path = reached.path | ends
            outputs = find_outputs(loss, path, ends, differentiable=False, of_weights=False)
            self._replicas.check_together()
            self.recognised = True
            if seed is None:
                return
            self._gather()
            # Several processes use g, which has one size on all of them; their numbers of rows may differ.
            rows = self.rows(reached) if self._replicas.group is None else {}
            generator = partial(self._generator, seed)
            taken = Taken(sample_roots(reached, outputs, self.weights, rows, generator, self.n_samples))
        loss.register_hook(taken.note)  # type: ignore[no-untyped-call]
        self._pending.append(taken)
        nodes.metadata(cast("Node", loss.grad_fn)).setdefault(_SEEN, weakref.WeakSet()).add(self)

    def _check_graph(self, reached: Reach) -> None:
        """Raises RuntimeError if the graph may hide a use of a weight, or allows only one backward."""
        hidden = [w.name for w in self.weights if w.parameter not in reached.leaves]
        if hidden and any(map(nodes.is_reentrant_checkpoint, reached.parents)):
            raise RuntimeError(
                f"the loss does not depend on the weight of `layer` {hidden[0]} outside reentrant activation "
                "checkpoints, and what happens in one is not in the graph. Checkpoint with "
                "use_reentrant=False, or leave the layers in the checkpoint out of `layer`."
            )
        if any(map(nodes.gives_buffers_away, reached.path)):
            raise RuntimeError(
                "mode='proximal' takes two backwards of a due loss, and a region in it, compiled before FAM "
                "was built, allows only one. Call torch.compiler.reset() after building FAM."
            )

    def rows(self, reached: Reach) -> dict[int, Node]:
        """Returns the matrix products whose rows A is made of, by the number of their weight."""
        return products_of_rows(reached, self.weights)

    def _generator(self, seed: int, device: torch.device) -> torch.Generator:
        """Returns the generator of the step's signs, which differ from process to process."""
        if device not in self._generators:
            seed = (seed + self._replicas.rank * APART) % 2**63
            self._generators[device] = torch.Generator(device).manual_seed(seed)
        return self._generators[device]

    def _is_seen(self, loss: Tensor) -> bool:
        """Returns whether A was taken from this loss, or from a scalar it was computed from, before. That
        happens in closures that call regularize() and then backward() on a multiple, as Lightning's do."""

        def scalars(node: Node) -> set[Any]:
            return {below for below, _ in node.next_functions if below and nodes.is_scalar(below)}

        root = cast("Node", loss.grad_fn)
        return any(self in nodes.metadata(node).get(_SEEN, ()) for node in {root, *spread([root], scalars)})

    def total(self) -> tuple[dict[int, Tensor], set[int]]:
        """Returns A ``(d, q)`` of the whole step and of all processes by weight, and the weights whose A is
        made of rows. With several processes it is zero for a weight that none uses."""
        self._gather()
        roots = self._roots
        if roots:  # shares weigh the micro-batches, but a share above one is due to a loss scale
            roots = added({}, roots, torch.stack(self._shares).amax().clamp_min(1).rsqrt())
        total = {i: root.matrix() for i, root in roots.items()}
        if self._replicas.group is not None:
            zeros = (w.of(w.parameter).new_zeros(w.d, w.m * self.n_samples) for w in self.weights)
            mine = [total.get(i, zero) for i, zero in enumerate(zeros)]
            total = dict(enumerate(self._replicas.joined(mine)))
        return total, {i for i, root in roots.items() if root.phi is not None}
