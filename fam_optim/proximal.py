"""The proximal step: flat layers at the price of a plain step, and one ``lam`` for all.

The base optimizer steps on the plain loss, from W' to W. After every k-th step each weight matrix is moved to
the minimum of kappa's quadratic, as far as the loss moves it:

    W  <-  argmin_V  <V V^T, T> + ||V - W||^2 / (2 c)  =  (I + 2 c T)^-1 W
    c   =  lam k ||W - W'||_F / ||2 T W||_F                              (0 where that is not finite)

T ``(d, d)`` is the running mean over due steps of ``A A^T``, A of `estimators.roots` from the step's batch;
where A is made of rows it is ``A A^T`` itself. The eigenvalues of the factor lie in (0, 1], so no weight
grows, whatever c is. Nothing depends on the unit of the loss, of the learning rate or of W, nor on the base.

Sources: kappa, Petzka et al. 2021. Proximal operator, Parikh and Boyd 2014. A penalty apart from the loss,
Loshchilov and Hutter 2019. Its length by the trust ratio, You et al. 2017. Gauss-Newton curvature from
sampled outputs every 10 steps, Liu et al. 2024.
"""

from __future__ import annotations

import weakref
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from fam_optim.compilation import opaque
from fam_optim.estimators.resolvent import Dense, LowRank, frobenius, squared_product
from fam_optim.estimators.roots import Roots, Rows, added, joined, products_of_rows, sample_roots
from fam_optim.estimators.running_mean import RunningMean, stack
from fam_optim.graph import nodes
from fam_optim.graph.losses import find_outputs
from fam_optim.graph.reach import reach
from fam_optim.graph.trace import check_scalar
from fam_optim.layer.weights import weight_matrix
from fam_optim.parallel import Replicas, unsunk

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch.autograd.graph import Node

_SEEN = "fam_optim.seen"
STACKED = 1 << 16
"""Weights of one shape with no more entries than this are stacked, to spare calls."""


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


class Proximal:
    """The proximal step of some weights, and what it keeps from step to step.

    It is one object beside the optimizer, as `Penalty` is, and for the same reason.

    Attributes:
        weights: the weight matrices, each once.
        lam: how far kappa pulls each weight, relative to the loss; at least 0.
        every: steps of the base from one proximal step to the next.
        steps: of the base, so far.
        seed: of the signs, together with the number of the step and the process.
        means: T of every weight.
        last_kappa: ``||A^T W||_F^2`` of the last due step, over all weights: an unbiased kappa of its loss.
        given: whether `regularize` was called since the last step.
    """

    def __init__(
        self,
        layers: Sequence[Any],
        lam: float,
        every: int,
        n_samples: int,
        generator: torch.Generator | None,
    ) -> None:
        for name, value in (("every", every), ("n_samples", n_samples)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"expected `{name}` to be a positive integer, got {value!r}.")
        self.weights = list({id(w.parameter): w for w in map(weight_matrix, layers)}.values())
        self.lam, self.every, self.n_samples, self.steps = lam, every, n_samples, 0
        # torch's own generator is asked for its seed and not advanced.
        self.seed = torch.initial_seed() if generator is None else _draw_seed(generator)
        self.means = RunningMean()
        self.last_kappa: Tensor | None = None
        self._prepare()

    def _prepare(self) -> None:
        """What a new, copied or unpickled one needs beside its state."""
        self._recognised = False  # whether a loss of these weights has been seen
        self._replicas = Replicas([w.parameter for w in self.weights])
        self.forget()

    def forget(self) -> None:
        """Drops what was taken, as after a step."""
        self.given = False
        self._before: list[Tensor] | None = None
        self._taken: list[Taken] = []
        self._generators: dict[torch.device, torch.Generator] = {}

    def start(self, trained: Iterable[Tensor]) -> None:
        """Nothing: weights are found in the graph of a loss."""

    def gradients_zeroed(self) -> None:
        """Drops whatever was taken with the gradients: it is of a step that was not made."""
        self._taken = self._pending()
        if not self._taken:
            self._generators.clear()

    def _pending(self) -> list[Taken]:
        """What was taken of losses whose backward is still to come."""
        return [taken for taken in self._taken if not taken.backpropagated]

    @property
    def due(self) -> bool:
        """Whether the coming step is followed by a proximal one."""
        return self.lam > 0 and (self.steps + 1) % self.every == 0

    # Before the loss's backward: A

    def regularize(self, loss: Tensor) -> Tensor:
        """Takes A of a loss that is about to be backpropagated, if the step is due; returns the loss.

        Raises:
            RuntimeError: if the loss is not known to be convex in the network's outputs. The first loss is
                looked at too, so that this does not wait for a due step.
        """
        if self.due or (self.lam and not self._recognised):
            _untraced(self, loss)
        return loss

    def _see(self, loss: Tensor) -> None:
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
            self._recognised = True
            if not self.due or _is_seen(loss, self):
                return
            # g has the same size on all processes, however many rows they have.
            rows = products_of_rows(reached, self.weights) if alone else {}
            taken = Taken(sample_roots(reached, outputs, self.weights, rows, self._generator, self.n_samples))
        loss.register_hook(taken.note)  # type: ignore[no-untyped-call]
        for earlier in self._taken:
            if earlier.backpropagated:  # a micro-batch
                taken.roots = added(earlier.roots, taken.roots, self.weights)
        self._taken = [*self._pending(), taken]

    def _generator(self, device: torch.device) -> torch.Generator:
        """Of the coming step's signs."""
        if device not in self._generators:
            seed = self.seed + (self.steps << 20) + self._replicas.rank
            self._generators[device] = torch.Generator(device).manual_seed(seed % 2**63)
        return self._generators[device]

    # Around the base's step: the proximal one

    def before_step(self) -> None:
        """Keeps W' of every weight, if the step is due."""
        self._before = [w.parameter.detach().clone() for w in self.weights] if self.due else None

    def check(self, trained: Iterable[Tensor]) -> None:
        """Raises RuntimeError before a due step whose losses were not, or were others than, those seen."""
        if not self.due:
            return
        if self._taken and not any(taken.backpropagated for taken in self._taken):
            raise RuntimeError(
                "the loss that was given to regularize() was not backpropagated. Backpropagate what it "
                "returned: optimizer.regularize(loss).backward()."
            )
        if not self._recognised:
            raise RuntimeError(
                f"no loss so far depends on the weight of any `layer` ({self.names}), so there is nothing to "
                "keep flat. Expected layers of the model that is trained, whose weights require gradients."
            )

    def after_step(self) -> None:
        """Counts the step, and makes the proximal one if it was due."""
        self.steps += 1
        if self._before is not None:
            roots: Roots = {}
            for taken in self._taken:
                if taken.backpropagated:
                    roots = added(roots, taken.roots, self.weights)
            self._pull(roots, self._before)
        self.forget()

    @torch.no_grad()
    def _pull(self, roots: Roots, before: list[Tensor]) -> None:
        of_rows = {i for i, samples in roots.items() if isinstance(samples[0], Rows)}
        whole = self._of_all_processes({i: joined(samples) for i, samples in roots.items()})
        stacks: dict[Any, list[int]] = {}
        for i, a in whole.items():  # small weights of one shape make the step at once
            mean = self.means.kept[i].shape if i in self.means.kept else None
            alone = i if a.numel() > STACKED else None
            alike = (a.shape, self.weights[i].m, mean, i in of_rows, a.dtype, a.device, alone)
            stacks.setdefault(alike, []).append(i)
        kappas = [
            self._pull_alike(numbers, [whole[i] for i in numbers], before, numbers[0] in of_rows)
            for numbers in stacks.values()
        ]
        if kappas:
            self.last_kappa = torch.stack([kappa.to(kappas[0]) for kappa in kappas]).sum()

    def _pull_alike(
        self, numbers: list[int], roots: list[Tensor], before: list[Tensor], of_rows: bool
    ) -> Tensor:
        """The step of weights of one shape; returns the sum of their kappas."""
        weights = [self.weights[i] for i in numbers]
        a, w = stack(roots), stack([x.of(x.parameter) for x in weights])
        old = stack([x.of(before[i]) for i, x in zip(numbers, weights, strict=True)])
        size = frobenius(a)
        live = (size > 0) & (size < torch.inf)  # an expert may be run on no tokens
        a = torch.where(live[:, None, None], a, 0)
        if of_rows:
            t: Dense | LowRank = (of_batch := LowRank(a, w))
            kappa = of_batch.at_w.square().sum()
        else:
            t = self.means.add(numbers, a, w)
            kappa = squared_product(a, w)
        twice_c = self.lam * self.every * frobenius(old.sub_(w)) / t.pull
        moved = t.solve(torch.where(live & twice_c.isfinite(), twice_c, 0))
        for x, new in zip(weights, moved, strict=True):
            x.parameter.copy_(x.back(new))
        return kappa

    def _of_all_processes(self, roots: dict[int, Tensor]) -> dict[int, Tensor]:
        """A of the whole batch: zero of a weight that no process uses."""
        if self._replicas.group is None:
            return roots
        zeros = (w.of(w.parameter).new_zeros(w.d, w.m * self.n_samples) for w in self.weights)
        mine = [roots.get(i, zero) for i, zero in enumerate(zeros)]
        return dict(enumerate(self._replicas.joined(mine)))

    # Copies and checkpoints

    @property
    def names(self) -> str:
        """The layers, for messages."""
        return ", ".join(w.name for w in self.weights)

    def named_weights(self) -> list[tuple[str, list[Tensor]]]:
        """The layers' names with their parameters."""
        return [(w.name, [w.parameter]) for w in self.weights]

    def state(self) -> dict[str, Any]:
        """What a checkpoint needs beside lam."""
        return {"seed": self.seed, "steps": self.steps, "means": dict(self.means.kept)}

    def load(self, state: dict[str, Any]) -> None:
        """Goes on from a checkpoint.

        Raises:
            ValueError: if it is of other layers.
        """
        if "means" not in state:  # of a penalty
            return
        means: dict[int, Tensor] = state["means"]
        outputs = dict(enumerate(w.d for w in self.weights))
        saved = {i: len(mean) for i, mean in means.items()}
        if not saved.items() <= outputs.items():
            raise ValueError(
                f"expected a checkpoint of the same layers, of {list(outputs.values())} outputs; it has "
                f"means for {list(saved.values())}. Build FAM with the layers that it was saved with."
            )
        self.seed, self.steps = state["seed"], state["steps"]
        devices = {i: self.weights[i].parameter.device for i in means}
        self.means.kept = {i: mean.to(devices[i], copy=True) for i, mean in means.items()}
        self.forget()

    def __repr__(self) -> str:
        return f"mode='proximal', lam={self.lam}, every={self.every}, layer={self.names}"

    def __getstate__(self) -> dict[str, Any]:
        names = ("weights", "lam", "every", "n_samples", "steps", "seed", "means", "last_kappa")
        return {name: vars(self)[name] for name in names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._prepare()


def _is_seen(loss: Tensor, proximal: Proximal) -> bool:
    """Whether A was taken before of a loss, or of what it is a multiple of or a sum with.

    By regularize(), of a loss that a closure then backpropagates, scaled perhaps, as Lightning's does.
    """
    stack: list[Any] = [loss.grad_fn]
    while stack:
        node = stack.pop()
        if proximal in nodes.metadata(node).get(_SEEN, ()):
            return True
        stack.extend(below for below, _ in node.next_functions if below and nodes.is_scalar(below))
    nodes.metadata(cast("Node", loss.grad_fn)).setdefault(_SEEN, weakref.WeakSet()).add(proximal)
    return False


def _draw_seed(generator: torch.Generator) -> int:
    return int(torch.randint(2**62, (), generator=generator, device=generator.device))


@partial(opaque, reason="fam_optim looks into the graph of the loss")
def _untraced(proximal: Proximal, loss: Tensor) -> None:
    proximal._see(loss)
