"""A thousand steps, one in six with a fault: nothing drifts, nothing grows, nothing is lost.

Another run is clean, on the batches that were not hit. A fault must not be seen in the weights afterwards,
to the last bit, nor in memory, nor in the hooks of the model.
"""

from __future__ import annotations

import copy
import gc
import io
import mmap
import random
import weakref
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fam_optim import FAM
from tests.support import assert_same, recorded_calls, seeded

STEPS = 1000
WARM = 200
"""Steps until what is allocated once is there."""


class Fault(Exception):
    """Raised in the middle of a step, as a failing data loader or a watchdog does."""


def build(layer: int, seed: int = 0) -> tuple[nn.Sequential, FAM]:
    width = 64 if layer == 3 else 6  # the general path takes as many products as the layer is wide

    def network() -> nn.Sequential:
        return nn.Sequential(nn.Linear(5, width), nn.LayerNorm(width), nn.GELU(), nn.Linear(width, 3))

    net = seeded(network, seed).double()
    return net, FAM(net.parameters(), torch.optim.Adam, net[layer], 1e-3, lr=1e-3)


def learnable_batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(16, 5, generator=generator, dtype=torch.float64)
    return x, (x[:, :3] + torch.randn(16, 3, generator=generator, dtype=torch.float64)).argmax(1)


class Run:
    """A network in training.

    Attributes:
        kept: losses that the loop holds on to for a while, as logging does.
    """

    def __init__(self, style: str, layer: int) -> None:
        self.style, self.layer = style, layer
        self.net, self.fam = build(layer)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16, growth_interval=50)
        self.kept: list[Tensor] = []

    def step(self, x: Tensor, y: Tensor, fault: Callable[[str], None] = lambda where: None) -> None:
        """`fault` is called wherever a fault may strike."""
        if self.style == "regularize":
            self.fam.zero_grad()
            fault("before the forward")
            loss = self._loss(x, y, fault)
            regularized = self.fam.regularize(loss)
            fault("before the backward")
            regularized.backward()
            fault("after the backward")
            self.fam.step()
        elif self.style == "scaler":
            self.fam.zero_grad()
            fault("before the forward")
            loss = F.cross_entropy(self.net(x), y)
            self.kept.append(loss)
            scaled = self.scaler.scale(self.fam.regularize(loss))
            fault("before the backward")
            scaled.backward()
            self.scaler.step(self.fam)  # which skips what is not finite
            self.scaler.update()
        else:

            def closure() -> Tensor:
                self.fam.zero_grad()
                fault("before the forward")
                loss = self._loss(x, y, fault)
                if self.style == "calls backward":
                    loss.backward()
                    fault("after the backward")
                return loss

            self.fam.step(closure)

    def _loss(self, x: Tensor, y: Tensor, fault: Callable[[str], None]) -> Tensor:
        loss = F.cross_entropy(self.net(x), y)
        self.kept.append(loss)
        if not torch.isfinite(loss):
            raise Fault("the loss is not finite")
        fault("after the forward")
        return loss

    def reload(self) -> None:
        """Ends this process's work, as far as the run can tell, and goes on in another."""
        file = io.BytesIO()
        torch.save([self.net.state_dict(), self.fam.state_dict(), self.scaler.state_dict()], file)
        self.kept.clear()
        self.net, self.fam = build(self.layer, seed=1)
        self.scaler = torch.amp.GradScaler("cpu")
        file.seek(0)
        for part, state in zip(
            (self.net, self.fam, self.scaler), torch.load(file, weights_only=True), strict=True
        ):
            part.load_state_dict(state)


def strike(run: Run, kind: str, step: int) -> None:
    """One fault on a batch that the clean run does not see."""
    x, y = learnable_batch(10_000 + step)
    if kind in ("nan", "inf"):
        x[3, 2] = float(kind)
        if run.style == "scaler":
            scale = run.scaler.get_scale()
            run.step(x, y)
            assert run.scaler.get_scale() < scale, "the scaler has seen nothing"
        else:
            with pytest.raises(Fault, match="not finite"):
                run.step(x, y)
    elif kind == "reload":
        run.reload()
    elif kind == "evaluation":
        with torch.no_grad():
            run.net(x)
    elif kind == "unused forward":
        run.kept.append(F.cross_entropy(run.net(x), y))
    elif kind == "copy":
        twin, optimizer = copy.deepcopy((run.net, run.fam))
        optimizer.step(lambda: F.cross_entropy(twin(x), y))
    else:

        def fault(where: str) -> None:
            if where == kind:
                raise Fault(where)

        with pytest.raises(Fault, match=kind):
            run.step(x, y, fault)


EVERYWHERE = ["nan", "inf", "reload", "evaluation", "unused forward", "copy", "before the forward"]
FAULTS = {
    "returns loss": [*EVERYWHERE, "after the forward"],
    "calls backward": [*EVERYWHERE, "after the forward", "after the backward"],
    "regularize": [*EVERYWHERE, "after the forward", "before the backward", "after the backward"],
    "scaler": [*EVERYWHERE, "before the backward"],
}


def resident() -> int:
    """Bytes of this process's memory, the graphs and buffers of torch's C++ side included."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * mmap.PAGESIZE
    import resource  # POSIX only

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def inventory(run: Run) -> dict[str, int]:
    """What must not grow."""
    gc.collect()
    alive = [o for o in gc.get_objects() if issubclass(type(o), Tensor)]
    return {
        "tensors": len(alive),
        "numbers in tensors": sum(o.numel() for o in alive),
        "hooks": sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in run.net.modules()),
        "step hooks": len(run.fam._optimizer_step_pre_hooks) + len(run.fam._optimizer_step_post_hooks),
        "recorded calls": len(recorded_calls(run.net[run.layer])),
        "state": sum(t.numel() for s in run.fam.state.values() for t in s.values()),
    }


class Clean(NamedTuple):
    """What a run without faults comes to: its weights every hundred steps, and the last kappa."""

    weights: list[list[Tensor]]
    last_kappa: Tensor


@cache
def clean_run(layer: int, steps: int) -> Clean:
    """One for all styles, which take the same steps to the last bit: the scaler's factor is a power of 2."""
    run, weights = Run("returns loss", layer), []
    for step in range(steps):
        run.step(*learnable_batch(step))
        run.kept.clear()
        if step % 100 == 99:
            weights.append([p.detach().clone() for p in run.net.parameters()])
    x, y = learnable_batch(0)
    assert F.cross_entropy(run.net(x), y) < F.cross_entropy(build(layer)[0](x), y), "nothing was learnt"
    assert run.fam.last_kappa is not None
    return Clean(weights, run.fam.last_kappa)


@pytest.mark.slow
@pytest.mark.parametrize("layer", [3, 0], ids=["softmax head", "general path"])
@pytest.mark.parametrize("style", FAULTS)
def test_soak(style: str, layer: int) -> None:
    steps = STEPS if layer == 3 else STEPS // 5
    chance = random.Random(style)
    run, clean = Run(style, layer), clean_run(layer, steps)
    struck: Counter[str] = Counter()
    first: dict[str, int] = {}
    for step in range(steps):
        if chance.random() < 1 / 6:
            kind = chance.choice(FAULTS[style])
            strike(run, kind, step)
            struck[kind] += 1
        run.step(*learnable_batch(step))
        if step % 20 == 19:
            run.kept.clear()
        if step % 100 == 99:
            assert_same(
                run.net.parameters(), clean.weights[step // 100], f"step {step}, after {dict(struck)}"
            )
        if step == WARM * steps // STEPS - 1:
            first, memory = inventory(run), resident()
    assert set(struck) == set(FAULTS[style]), "not every fault has struck"
    assert torch.equal(run.fam.last_kappa, clean.last_kappa)  # type: ignore[arg-type]
    last = inventory(run)
    grown = {what: (first[what], last[what]) for what in first if last[what] > first[what]}
    assert not grown, f"grown since step {WARM}: {grown}"
    # One graph held per step would be 16 x 64 numbers several times over, 20 MB in all.
    assert resident() - memory < 8 * 2**20, f"{(resident() - memory) / 2**20:.1f} MB more after {steps} steps"


def test_a_finished_run_leaves_nothing() -> None:
    """Not a hook on the model, not the optimizer, not a call."""
    run = Run("returns loss", 3)
    for step in range(20):
        run.step(*learnable_batch(step))
    net, optimizer = run.net, weakref.ref(run.fam)
    del run
    gc.collect()
    assert optimizer() is None
    assert not net[3]._forward_hooks
    assert not recorded_calls(net[3])
