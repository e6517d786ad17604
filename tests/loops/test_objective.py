"""A base optimizer that reads the loss gets the function whose gradient it gets; the user the plain loss."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fam_optim import FAM, observe, relative_flatness

pytestmark = pytest.mark.usefixtures("float64")

LAM = 0.3
X = torch.randn(8, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
Y = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])
HALVES = ((X[:4], Y[:4]), (X[4:], Y[4:]))


class Reader(torch.optim.SGD):
    """Keeps what the closure returned to it."""

    def step(self, closure: Any = None) -> Any:
        with torch.enable_grad():
            self.read = closure()
        super().step()
        return self.read


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))


def kappa(model: nn.Sequential, x: Tensor = X, y: Tensor = Y) -> Tensor:
    with observe(model[2]) as layer:
        loss = F.cross_entropy(model(x), y)
    return relative_flatness(loss, layer).detach()


def returns_loss(model: nn.Sequential, fam: FAM) -> Any:
    return F.cross_entropy(model(X), Y)


def calls_backward(model: nn.Sequential, fam: FAM) -> Any:
    loss = F.cross_entropy(model(X), Y)
    loss.backward()
    return loss


def returns_regularized(model: nn.Sequential, fam: FAM) -> Any:
    return fam.regularize(F.cross_entropy(model(X), Y))


def returns_regularized_and_scaled(model: nn.Sequential, fam: FAM) -> Any:
    return fam.regularize(2 * F.cross_entropy(model(X), Y)) / 2


def regularizes_and_returns_plain(model: nn.Sequential, fam: FAM) -> Any:
    loss = F.cross_entropy(model(X), Y)
    fam.regularize(loss).backward()
    return loss


def regularizes_and_returns_that(model: nn.Sequential, fam: FAM) -> Any:
    loss = fam.regularize(F.cross_entropy(model(X), Y))
    loss.backward()
    return loss


def scales_as_a_grad_scaler(model: nn.Sequential, fam: FAM) -> Any:
    loss = F.cross_entropy(model(X), Y)
    (loss * 64.0).backward()
    for p in model.parameters():
        assert p.grad is not None
        p.grad /= 64
    return loss


def several_backwards(model: nn.Sequential, fam: FAM) -> Any:
    losses = [F.cross_entropy(model(x), y) / 2 for x, y in HALVES]
    for loss in losses:
        loss.backward()
    return losses[0] + losses[1]


def several_scaled_backwards(model: nn.Sequential, fam: FAM) -> Any:
    losses = [F.cross_entropy(model(x), y) / 2 for x, y in HALVES]
    for loss in losses:
        (64.0 * loss).backward()
    for p in model.parameters():
        assert p.grad is not None
        p.grad /= 64
    return losses[0] + losses[1]


def several_backwards_and_a_detached_sum(model: nn.Sequential, fam: FAM) -> Any:
    total = torch.zeros(())
    for x, y in HALVES:
        loss = F.cross_entropy(model(x), y) / 2
        loss.backward()
        total += loss.detach()
    return total


def several_backwards_and_a_number(model: nn.Sequential, fam: FAM) -> Any:
    return several_backwards_and_a_detached_sum(model, fam).item()


def several_backwards_and_a_mean(model: nn.Sequential, fam: FAM) -> Any:
    losses = [F.cross_entropy(model(x), y) for x, y in HALVES]
    for loss in losses:
        (loss / 2).backward()
    return torch.stack(losses).mean()


def another_loss_beside(model: nn.Sequential, fam: FAM) -> Any:
    """Which has no penalty, and is not in what is returned."""
    (0.0 * model[0].weight.square().sum() + 5).backward()
    return calls_backward(model, fam)


STYLES = {
    function.__name__: function
    for function in (
        *(returns_loss, calls_backward, returns_regularized, returns_regularized_and_scaled),
        *(regularizes_and_returns_plain, regularizes_and_returns_that, scales_as_a_grad_scaler),
        *(several_backwards, several_scaled_backwards, several_backwards_and_a_detached_sum),
        *(several_backwards_and_a_number, several_backwards_and_a_mean, another_loss_beside),
    )
}


@pytest.mark.parametrize("style", STYLES.values(), ids=STYLES)
def test_the_base_reads_the_objective_and_the_user_the_plain_loss(style: Any) -> None:
    """kappa is linear in the loss, so that of the whole batch is the sum of those of its halves."""
    model = net()
    plain, penalty = F.cross_entropy(model(X), Y).item(), LAM * kappa(model).item()
    wanted = torch.autograd.grad(objective_of(model), list(model.parameters()))
    fam = FAM(model.parameters(), Reader, model[2], LAM, lr=0.0)

    def closure() -> Any:
        fam.zero_grad()
        return style(model, fam)

    returned = fam.step(closure)
    assert float(fam.base_optimizer.read) == pytest.approx(plain + penalty, rel=1e-12)
    assert float(returned) == pytest.approx(plain, rel=1e-12)
    assert type(returned) is type(fam.base_optimizer.read)
    for p, g in zip(model.parameters(), wanted, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=1e-9, atol=1e-14)


def objective_of(model: nn.Sequential) -> Tensor:
    with observe(model[2]) as layer:
        loss = F.cross_entropy(model(X), Y)
    return loss + LAM * relative_flatness(loss, layer)


@pytest.mark.parametrize("lam", [0.3, 1.0])
@pytest.mark.parametrize("search", [None, "strong_wolfe"])
@pytest.mark.parametrize("style", [returns_loss, calls_backward, several_backwards])
def test_lbfgs_is_that_of_the_objective(style: Any, search: str | None, lam: float) -> None:
    """Step by step the same as LBFGS on a closure that computes loss + lam * kappa itself."""
    settings: dict[str, Any] = {"lr": 0.5, "max_iter": 20, "line_search_fn": search}
    model, other = net(), net()
    fam = FAM(model.parameters(), torch.optim.LBFGS, model[2], lam, **settings)
    plain = torch.optim.LBFGS(other.parameters(), **settings)

    def closure() -> Any:
        fam.zero_grad()
        return style(model, fam)

    def objective() -> Tensor:
        plain.zero_grad()
        with observe(other[2]) as layer:
            loss = F.cross_entropy(other(X), Y)
        value = loss + lam * relative_flatness(loss, layer)
        value.backward()
        return value

    for _ in range(3):
        before = F.cross_entropy(model(X), Y).item()
        assert float(fam.step(closure)) == pytest.approx(before, rel=1e-12), (
            "the first evaluation's plain loss"
        )
        plain.step(objective)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-7, atol=1e-9)


class Polyak(torch.optim.Optimizer):
    """Steps of the length ``objective / ||gradient||^2``."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        with torch.enable_grad():
            value = closure()
        gradients = [p.grad for p in self.param_groups[0]["params"]]
        length = value / sum(g.square().sum() for g in gradients)
        for p, g in zip(self.param_groups[0]["params"], gradients, strict=True):
            p -= 0.1 * length * g
        return value


def test_polyak_steps_are_those_of_the_objective() -> None:
    model, other = net(), net()
    fam, plain = FAM(model.parameters(), Polyak, model[2], LAM), Polyak(other.parameters())

    def closure() -> Tensor:
        fam.zero_grad()
        return F.cross_entropy(model(X), Y)

    def objective() -> Tensor:
        plain.zero_grad()
        value = objective_of(other)
        value.backward()
        return value

    for _ in range(5):
        fam.step(closure)
        plain.step(objective)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)


def test_a_regularised_loss_that_is_gone_is_refused() -> None:
    """A sum of several, backpropagated one by one: what they were is not in what is returned."""
    model = net()
    fam = FAM(model.parameters(), torch.optim.SGD, model[2], LAM, lr=0.1)

    def closure() -> Tensor:
        fam.zero_grad()
        losses = [
            fam.regularize(F.cross_entropy(model(x), y)) * torch.ones((), requires_grad=True)
            for x, y in HALVES
        ]
        for loss in losses:
            loss.backward()
        return losses[0] * losses[1]

    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match="Expected it to return the plain loss"):
        fam.step(closure)
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


class TwoEvaluations(torch.optim.SGD):
    """Moves the weights and evaluates the closure again, which is nobody's habit that can be known before."""

    def step(self, closure: Any = None) -> Any:
        with torch.enable_grad():
            loss = closure()
        super().step()
        with torch.enable_grad():
            closure()
        return loss


@pytest.mark.parametrize("base", [TwoEvaluations, torch.optim.LBFGS])
@pytest.mark.parametrize("good", [0, 2], ids=["first step", "later step"])
def test_a_step_that_fails_halfway_leaves_everything_as_it_was(base: Any, good: int) -> None:
    model = net()
    settings = {"momentum": 0.9} if base is TwoEvaluations else {"max_iter": 5}
    fam = FAM(model.parameters(), base, model[2], LAM, lr=0.1, **settings)
    evaluations = 0

    def closure() -> Tensor:
        nonlocal evaluations
        evaluations += 1
        if evaluations == fail_at:
            raise ValueError("out of data")
        fam.zero_grad()
        return F.cross_entropy(model(X), Y)

    fail_at = -1
    for _ in range(good):
        fam.step(closure)
    before = [p.detach().clone() for p in model.parameters()]
    state = {k: flat(v) for k, v in fam.state_dict()["state"].items()}
    evaluations, fail_at = 0, 2
    with pytest.raises(ValueError, match="out of data"):
        fam.step(closure)
    for p, b in zip(model.parameters(), before, strict=True):
        assert torch.equal(p, b)
    after = {k: flat(v) for k, v in fam.state_dict()["state"].items()}
    assert state.keys() == after.keys()
    for key, old in state.items():
        torch.testing.assert_close(after[key], old, rtol=0, atol=0)


def flat(state: dict[str, Any]) -> dict[str, Any]:
    return {
        name: [t.clone() if isinstance(t, Tensor) else t for t in value] if isinstance(value, list)
        else value.clone() if isinstance(value, Tensor) else value
        for name, value in state.items()
    }  # fmt: skip


def test_lbfgs_history_is_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is appended to and dropped from, never written into."""
    model = net()
    fam = FAM(model.parameters(), torch.optim.LBFGS, model[2], LAM, lr=0.1, max_iter=3)
    for _ in range(3):
        fam.step(lambda: F.cross_entropy(model(X), Y))
    state = next(iter(fam.state.values()))
    history, contents = list(state["old_dirs"]), [d.clone() for d in state["old_dirs"]]
    fam.step(lambda: F.cross_entropy(model(X), Y))
    now = next(iter(fam.state.values()))["old_dirs"]
    assert len(now) > len(history) and all(a is b for a, b in zip(now, history, strict=False))
    assert all(torch.equal(a, b) for a, b in zip(history, contents, strict=True))


def test_a_mark_is_not_taken_for_another_optimizers() -> None:
    """An object made after another is gone may have its identity."""
    model = net()
    for _ in range(200):
        first = FAM(model.parameters(), torch.optim.SGD, model[2], LAM, lr=0.1)
        regularized = first.regularize(F.cross_entropy(model(X), Y))
        del first
        second = FAM(model.parameters(), torch.optim.SGD, model[2], LAM, lr=0.1)
        assert second.regularize(regularized) is not regularized
