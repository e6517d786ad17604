"""What a SAM wrapper does in the loops of the manual's table, seen with one version of pytorch_optimizer.

FAM's column of that table is tested elsewhere. These are facts of another package: a newer version may do
better, and is not tested.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from importlib.metadata import version

import pytest
import torch
import torch.nn.functional as F
from pytorch_optimizer import SAM
from pytorch_optimizer.base.exception import NoClosureError
from torch import Tensor, nn

pytestmark = pytest.mark.skipif(
    version("pytorch_optimizer") != "4.1.0", reason="the manual's table was seen with pytorch_optimizer 4.1.0"
)

X, Y = torch.randn(8, 4, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 3


class Loop:
    """A network with SAM, and a closure that does what SAM wants of it."""

    def __init__(self, base: type[torch.optim.Optimizer] = SAM) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
        parameters = self.model.parameters()
        wrapped = (torch.optim.SGD,) if base is SAM else ()
        self.optimizer = base(parameters, *wrapped, lr=0.1)

    def loss(self) -> Tensor:
        return F.cross_entropy(self.model(X), Y)

    def closure(self) -> Tensor:
        self.optimizer.zero_grad()
        loss = self.loss()
        loss.backward()
        return loss

    def step(self) -> None:
        self.closure()
        assert self.optimizer.step(self.closure) is None

    def weights(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.model.parameters()]


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(map(torch.equal, a, b))


def test_closure_that_returns_the_loss_changes_nothing_in_silence() -> None:
    loop = Loop()
    before = loop.weights()
    assert loop.optimizer.step(loop.loss) is None
    assert equal(loop.weights(), before)


def test_closure_alone_perturbs_along_no_gradient_then_an_old_one_in_silence() -> None:
    alone, plain, right = Loop(), Loop(torch.optim.SGD), Loop()
    alone.optimizer.step(alone.closure)
    plain.optimizer.step(plain.closure)
    right.step()
    assert equal(alone.weights(), plain.weights())
    assert not equal(alone.weights(), right.weights())
    alone.optimizer.step(alone.closure)
    plain.optimizer.step(plain.closure)
    assert not equal(alone.weights(), plain.weights())


def test_two_forwards_and_batch_norm_updated_twice() -> None:
    loop = Loop()
    loop.step()
    assert loop.model[1].num_batches_tracked == 2


@pytest.mark.parametrize("loop", ["plain", "Accelerate"])
def test_step_without_closure_is_refused(loop: str) -> None:
    run = Loop()
    optimizer = run.optimizer
    if loop == "Accelerate":
        from accelerate import Accelerator

        optimizer = Accelerator(cpu=True).prepare(optimizer)
    run.loss().backward()
    with pytest.raises(NoClosureError):
        optimizer.step()


def test_gradient_scaler_takes_no_closure() -> None:
    loop, scaler = Loop(), torch.amp.GradScaler("cpu")
    scaler.scale(loop.loss()).backward()
    with pytest.raises(RuntimeError, match=r"[Cc]losure"):
        scaler.step(loop.optimizer, closure=loop.closure)


def test_failing_closure_leaves_the_weights_perturbed() -> None:
    loop = Loop()
    loop.closure()
    before = loop.weights()

    def failing() -> Tensor:
        raise FloatingPointError

    with pytest.raises(FloatingPointError):
        loop.optimizer.step(failing)
    assert not equal(loop.weights(), before)


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_copies_do_not_step(copier: Callable[[Loop], Loop]) -> None:
    loop = copier(Loop())
    with pytest.raises(AttributeError, match="perturb_eps"):
        loop.step()


def test_checkpoint_of_the_plain_base_is_not_taken() -> None:
    plain, loop = Loop(torch.optim.SGD), Loop()
    plain.optimizer.step(plain.closure)
    loop.optimizer.load_state_dict(plain.optimizer.state_dict())
    with pytest.raises(KeyError, match="rho"):
        loop.step()


def test_own_checkpoint_resumes_and_schedulers_drive_the_base() -> None:
    loops = [Loop(), Loop()]
    loops[0].step()
    loops[1].model.load_state_dict(loops[0].model.state_dict())
    loops[1].optimizer.load_state_dict(copy.deepcopy(loops[0].optimizer.state_dict()))
    for loop in loops:
        schedule = torch.optim.lr_scheduler.ExponentialLR(loop.optimizer, 0.5)
        loop.step()
        schedule.step()
        assert loop.optimizer.base_optimizer.param_groups[0]["lr"] == 0.05
        loop.step()
    assert equal(loops[0].weights(), loops[1].weights())
