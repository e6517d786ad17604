"""The proximal step makes layers flat at about the cost of a plain step, with one ``lam`` for all networks.

The base optimizer steps on the plain loss, from W' to W. After every k-th step each W moves towards the
minimum of kappa, a quadratic in W, to first order `lam` times as far as the loss moves it in k steps:

    W  <-  argmin_V  <V V^T, T> + ||V - W||^2 / (2 c)  =  (I + 2 c T)^-1 W
    c   =  lam k ||W - W'||_F / ||2 T W||_F                              (0 where that is not finite)

T ``(d, d)`` is the running mean of ``A A^T`` over due steps (the k-th, 2k-th, ...), where `estimators.roots`
takes A from the step's batch. Where A is made of rows, T is ``A A^T`` of this step alone. All eigenvalues of
the factor lie in (0, 1], so no weight grows, whatever c is. No unit (of the loss, the learning rate or W) and
no choice of base optimizer changes what lam means.

Sources: kappa, Petzka et al. 2021. Proximal operator, Parikh and Boyd 2014. Keeping a penalty apart from the
loss, Loshchilov and Hutter 2019. A step length from the trust ratio, You et al. 2017. Gauss-Newton curvature
from sampled outputs every 10 steps, Liu et al. 2024.
"""

import weakref
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import LBFGS, Optimizer

from fam_optim.estimators.running_mean import Dense, LowRank, RunningMean, shape_of_mean, stack
from fam_optim.gradients import Ledger
from fam_optim.graph import nodes
from fam_optim.graph.reach import check_scalar
from fam_optim.layer.kinds import check_unchanged, weight_matrix
from fam_optim.regularizer import Regularizer
from fam_optim.step_roots import StepRoots
from fam_optim.unnoticed import in_full_precision, opaque

STACKED = 1 << 16  # weights of one shape whose A has at most this many entries are stacked, to save calls


class Proximal(Regularizer):
    """Makes the proximal step of a set of weights and keeps what it needs from step to step. `last_kappa` is
    the sum of ``||A^T W||_F^2`` over all weights at the last due step, an unbiased kappa."""

    _saved = ("weights", "lam", "every", "n_samples", "steps", "seed", "means", "last_kappa")

    def __init__(
        self, layers: Sequence[Any], lam: float, every: int, n_samples: int, generator: torch.Generator | None
    ) -> None:
        self.weights = list({id(w.parameter): w for w in map(weight_matrix, layers)}.values())
        self.lam, self.every, self.n_samples = lam, every, n_samples
        self.steps = 0  # how many the base has made; with the seed and the process they determine the signs
        self.seed = torch.initial_seed()  # which does not advance torch's own generator
        if generator is not None:
            self.seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
        self.means = RunningMean()
        self._prepare()
        # Of parameters there must be no weak reference, or torch.utils.swap_tensors refuses them.
        self._layers: list[Any] = [weakref.ref(layer) for layer in layers if not isinstance(layer, Tensor)]

    def _prepare(self) -> None:
        nodes.keep_buffers()  # a due step runs two backwards through one graph
        self.roots = StepRoots(self.weights, self.n_samples)
        self._layers = []  # it stays empty in a copy or an unpickled object
        self.forget()

    def start(self, base: Optimizer) -> None:
        if isinstance(base, LBFGS):
            raise ValueError(
                "mode='proximal' moves the weights between steps, and LBFGS's history of them would be "
                "wrong. Use another base optimizer, or mode='hutchinson' with curvature='gauss_newton'."
            )
        super().start(base)

    def forget(self, *, sound: bool = True) -> None:
        """Forgets what was seen of a step, and begins the next one; `sound` is that of `_begin`."""
        self.given = False
        self._before: list[Tensor] | None = None
        self.roots.forget()
        self._begin(sound=sound)

    def _begin(self, *, sound: bool) -> None:
        """Decides whether the coming step is due; `sound` allows gradients that are already there."""
        self._ledger: Ledger | None = None  # watches the backwards of a due step; None if it is not due
        if self.lam > 0 and (self.steps + 1) % self.every == 0:
            weights: list[Tensor] = [w.parameter for w in self.weights]
            self._ledger = Ledger(self.names, weights, lambda: weights, sound=sound)
            self._ledger.watch()

    def change_lam(self, lam: float) -> None:
        super().change_lam(lam)
        if not (self.given and lam):  # else a step could become due after part of its losses had passed
            self._begin(sound=False)

    def gradients_zeroed(self) -> None:
        self.roots.gradients_zeroed()

    def named_weights(self) -> list[tuple[str, list[Tensor]]]:
        return [(w.name, [w.parameter]) for w in self.weights]

    @property
    def looks(self) -> bool:
        """Whether to look at the coming losses: those of due steps and the first ones, to refuse early."""
        return self._ledger is not None or (self.lam > 0 and not self.roots.recognised)

    def regularize(self, loss: Tensor) -> Tensor:
        """Returns the loss unchanged; first takes A from it, if the coming step is due."""
        if self.looks or (self.lam and getattr(loss, "grad_fn", None) is None):  # refused at every step
            self._look(loss)
        return loss

    @partial(opaque, reason="fam_optim looks into the graph of the loss")
    def _look(self, loss: Tensor) -> None:
        check_scalar(loss)
        ledger = self._ledger
        with in_full_precision(loss.device):
            if ledger is not None and ledger.added:  # gradients of this step may have been zeroed since then
                self.roots.keep_if(ledger.left())
            self.roots.see(loss, None if ledger is None else self.seed + (self.steps << 20))
        if ledger is not None:
            ledger.expect(loss)

    def check(self) -> None:
        """Refuses a due step if other losses were seen than backpropagated, or a weight was replaced."""
        if self._ledger is None:
            return
        check_unchanged((alive for layer in self._layers if (alive := layer()) is not None), self.weights)
        if self.roots.only_pending:
            raise RuntimeError("a loss given to regularize() was not backpropagated. Call backward() on it.")
        if not self.roots.recognised and any(w.parameter.requires_grad for w in self.weights):
            raise RuntimeError(
                f"no loss so far depends on the weight of any `layer` ({self.names}), so there is nothing to "
                "keep flat. Expected layers of the model that is trained, whose weights require gradients."
            )
        self._ledger.check()

    def before_step(self) -> None:
        """Copies every weight as W', if the step is due."""
        self._before = None if self._ledger is None else [w.parameter.detach().clone() for w in self.weights]

    def after_step(self) -> None:
        """Counts the step, and then makes the proximal step if one is due."""
        self.steps += 1
        if self._before is not None:
            with in_full_precision(self._before[0].device):  # the step may be made under autocast
                self._pull(*self.roots.total(), self._before)
        self.forget()

    @torch.no_grad()
    def _pull(self, roots: dict[int, Tensor], of_rows: set[int], before: list[Tensor]) -> None:
        """Makes the proximal step of all weights that have an A, of small ones of one shape together."""
        stacks: dict[Any, list[int]] = {}
        for i, a in roots.items():
            alone = i if a.numel() > STACKED else None
            alike = (a.shape, self.weights[i].m, i in of_rows, a.dtype, a.device, alone)
            stacks.setdefault(alike, []).append(i)
        kappas: list[Tensor] = []
        for numbers in stacks.values():
            weights = [self.weights[i] for i in numbers]
            a, w = stack([roots[i] for i in numbers]), stack([x.of(x.parameter) for x in weights])
            old = stack([x.of(before[i]) for i, x in zip(numbers, weights, strict=True)])
            size = torch.linalg.matrix_norm(a)
            live = (size > 0) & (size < torch.inf)  # A is 0 for, say, an expert that got no tokens
            a = torch.where(live[:, None, None], a, 0)
            t: Dense | LowRank
            if numbers[0] in of_rows:
                t = of_batch = LowRank(a, w)
                kappa = of_batch.at_w.square().sum()
            else:
                t, kappa = self.means.add(numbers, a, w, live)
            kappas.append(kappa)
            twice_c = self.lam * self.every * torch.linalg.matrix_norm(old.sub_(w)) / t.pull
            moved = t.solve(torch.where(live & twice_c.isfinite(), twice_c, 0))
            for x, new in zip(weights, moved, strict=True):
                x.parameter.copy_(x.back(new))
        if kappas:
            self.last_kappa = torch.stack([kappa.to(kappas[0]) for kappa in kappas]).sum()

    def state(self) -> dict[str, Any]:
        # Has every mean at any time: torch.distributed.checkpoint loads no more than the new FAM's state has.
        shapes = zip(self.weights, self._shapes(), strict=True)
        zeros = [w.of(w.parameter).new_zeros(shape) for w, shape in shapes]
        means = {**dict(enumerate(zeros)), **self.means.kept}
        return {"lam": self.lam, "seed": self.seed, "steps": self.steps, "means": means}

    def _shapes(self) -> list[tuple[int, int]]:
        return [shape_of_mean(w.d, w.m * self.n_samples) for w in self.weights]

    def load(self, state: dict[str, Any]) -> None:
        self.means.load(state["means"], self._shapes())
        self.lam, self.seed, self.steps = state["lam"], state["seed"], state["steps"]
        self.forget(sound=False)  # nothing is known any more about the losses behind the present gradients

    def __repr__(self) -> str:
        return f"mode='proximal', lam={self.lam}, every={self.every}, layer={self.names}"
