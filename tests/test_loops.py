"""Loops as people write them: accumulation, clipping, schedulers, averaging, several optimizers, threads.

Each runs twice, with FAM and as a plain loop whose gradient is that of ``loss + lam * kappa`` with
kappa by its definition (tests.reference). The weights must agree to rounding.
"""

from __future__ import annotations

import copy
import gc
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import lr_scheduler, swa_utils
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile

from fam_optim import FAM, observe, relative_flatness
from tests import reference

LAM = 0.05
ROUNDING = 1e-12
"""Of a single step. Several steps may be off by a little more."""


@pytest.fixture(autouse=True)
def double_precision() -> Iterator[None]:
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(default)


class Net(nn.Module):
    """No BatchNorm and no dropout: the reference may call it as often as it likes."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.body = nn.Sequential(nn.Linear(5, 6), nn.Tanh())
            self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def batch(step: int, n: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return torch.randn(n, 5, generator=generator), torch.randint(0, 3, (n,), generator=generator)


Loss = Callable[[], Tensor]


def penalty(loss: Loss, layer: nn.Module | nn.Parameter, measure: str = "neuronwise") -> Tensor:
    """kappa by its definition, differentiable."""
    return reference.sum_of_kappas(reference.curvatures(loss, [layer], create_graph=True), measure)


def set_gradients(value: Tensor, parameters: Sequence[nn.Parameter], add: bool = False) -> None:
    gradients = reference.gradient(value, parameters)
    for p, g in zip(parameters, gradients, strict=True):
        p.grad = g if p.grad is None or not add else p.grad + g


def plain_step(model: Net, base: torch.optim.Optimizer, x: Tensor, y: Tensor, lam: float = LAM) -> Tensor:
    """One step of the base on the plain mathematical answer."""

    def loss() -> Tensor:
        return F.cross_entropy(model(x), y)

    set_gradients(loss() + lam * penalty(loss, model.head), list(model.parameters()))
    base.step()
    return loss()


def assert_close(actual: Any, expected: Any, what: str, tolerance: float = ROUNDING) -> None:
    for a, e in zip(actual, expected, strict=True):
        error = (a - e).norm() / e.norm().clamp_min(1e-300)
        assert error <= tolerance, f"{what}: relative error {error:.1e}"


def assert_same(actual: Any, expected: Any, what: str) -> None:
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a, e), f"{what}: differs by {(a - e).abs().max():.1e}"


def gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


# ------------------------------------------------------------------------------ styles of one step


def returns_loss(model: nn.Module, fam: FAM, x: Tensor, y: Tensor, **_: Any) -> Any:
    def closure() -> Tensor:
        fam.zero_grad()
        return F.cross_entropy(model(x), y)

    return fam.step(closure)


def calls_backward(
    model: nn.Module, fam: FAM, x: Tensor, y: Tensor, between: Callable[[], Any] = lambda: None
) -> Any:
    def closure() -> Tensor:
        fam.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        between()
        return loss

    return fam.step(closure)


def regularizes(
    model: nn.Module, fam: FAM, x: Tensor, y: Tensor, between: Callable[[], Any] = lambda: None
) -> Any:
    fam.zero_grad()
    loss = F.cross_entropy(model(x), y)
    fam.regularize(loss).backward()
    between()
    fam.step()
    return loss


STYLES = {"returns loss": returns_loss, "calls backward": calls_backward, "regularize": regularizes}
CLIPPABLE = {"calls backward": calls_backward, "regularize": regularizes}
by_style = pytest.mark.parametrize("style", STYLES.values(), ids=STYLES)
Style = Callable[..., Any]


# ------------------------------------------------------------------------- gradient accumulation

SIZES = [5, 2, 1]
REDUCTIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sum": lambda z, y: F.cross_entropy(z, y, reduction="sum"),
    "share of the mean": lambda z, y: F.cross_entropy(z, y) * (len(y) / sum(SIZES)),
    "sum over the batch size": lambda z, y: F.cross_entropy(z, y, reduction="sum") / sum(SIZES),
}


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("style", ["backwards in one closure", "regularize", "regularize in one closure"])
@pytest.mark.parametrize("layer", ["body", "head"])
def test_uneven_micro_batches_are_the_full_batch(layer: str, style: str, reduction: str) -> None:
    loss_fn = REDUCTIONS[reduction]
    model, reference_model = Net(), Net()
    of = {"body": lambda m: m.body[0], "head": lambda m: m.head}[layer]
    fam = FAM(model.parameters(), torch.optim.SGD, of(model), LAM, lr=0.1, momentum=0.9)
    base = torch.optim.SGD(reference_model.parameters(), lr=0.1, momentum=0.9)
    for step in range(2):
        x, y = batch(step)
        micro = list(zip(x.split(SIZES), y.split(SIZES), strict=True))

        def closure(micro: Any = micro) -> Tensor:
            fam.zero_grad()
            total = torch.zeros(())
            for xs, ys in micro:
                loss = loss_fn(model(xs), ys)
                (fam.regularize(loss) if "regularize" in style else loss).backward()
                total += loss.detach()
            return total

        if style == "regularize":
            returned = closure()
            fam.step()
        else:
            returned = fam.step(closure)

        def whole(x: Tensor = x, y: Tensor = y) -> Tensor:
            return loss_fn(reference_model(x), y)

        value = whole()
        set_gradients(value + LAM * penalty(whole, of(reference_model)), list(reference_model.parameters()))
        assert_close(gradients(model), gradients(reference_model), f"gradients of step {step}")
        base.step()
        assert_close(model.parameters(), reference_model.parameters(), f"weights after step {step}")
        assert_close([returned], [value.detach()], "the closure's own loss is returned")


# ------------------------------------------------------------------------------ gradient clipping


@pytest.mark.parametrize("clip", ["norm", "value"])
@pytest.mark.parametrize("style", CLIPPABLE.values(), ids=CLIPPABLE)
def test_clipping_between_backward_and_step(style: Style, clip: str) -> None:
    model, reference_model = Net(), Net()
    fam = FAM(model.parameters(), torch.optim.Adam, model.head, LAM, lr=0.05)
    base = torch.optim.Adam(reference_model.parameters(), lr=0.05)
    norms = []

    def clip_gradients(of: nn.Module) -> None:
        if clip == "norm":
            norms.append(nn.utils.clip_grad_norm_(of.parameters(), 0.1))
        else:
            nn.utils.clip_grad_value_(of.parameters(), 0.02)

    for step in range(3):
        x, y = batch(step)
        style(model, fam, x, y, between=lambda: clip_gradients(model))

        def loss(x: Tensor = x, y: Tensor = y) -> Tensor:
            return F.cross_entropy(reference_model(x), y)

        set_gradients(loss() + LAM * penalty(loss, reference_model.head), list(reference_model.parameters()))
        unclipped = gradients(reference_model)
        clip_gradients(reference_model)
        assert not torch.equal(unclipped[0], gradients(reference_model)[0]), "nothing to clip here"
        base.step()
        assert_close(model.parameters(), reference_model.parameters(), f"weights after step {step}", 1e-11)
    assert_close(norms[::2], norms[1::2], "the norms, which contain the penalty's gradient", 1e-11)


def test_gradient_hooks_clip_where_fam_calls_backward() -> None:
    """There is no between in this style; hooks on the parameters see the gradient of loss + lam * kappa."""
    model, reference_model = Net(), Net()
    fam = FAM(model.parameters(), torch.optim.SGD, model.head, LAM, lr=0.1)
    for p in model.parameters():
        p.register_hook(lambda g: g.clamp(-0.02, 0.02))
    x, y = batch(0)
    returns_loss(model, fam, x, y)

    def loss() -> Tensor:
        return F.cross_entropy(reference_model(x), y)

    set_gradients(loss() + LAM * penalty(loss, reference_model.head), list(reference_model.parameters()))
    assert max(g.abs().max().item() for g in gradients(reference_model)) > 0.02
    nn.utils.clip_grad_value_(reference_model.parameters(), 0.02)
    torch.optim.SGD(reference_model.parameters(), lr=0.1).step()
    assert_close(model.parameters(), reference_model.parameters(), "weights")


# --------------------------------------------------------------------------------------- schedulers

STEPS = 6
SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=STEPS),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.3, total_steps=STEPS + 1),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0, threshold=0.5),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=2), lr_scheduler.StepLR(o, 1, 0.5)], milestones=[2]
    ),
    "LambdaLR warm-up": lambda o: lr_scheduler.LambdaLR(o, lambda step: min(1.0, (step + 1) / 3)),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=2),
    "SWALR": lambda o: swa_utils.SWALR(o, swa_lr=0.01, anneal_epochs=3),
}


@by_style
@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_drive_the_base(name: str, style: Style) -> None:
    model, reference_model = Net(), Net()
    momentum = {"momentum": 0.9, "nesterov": True, "lr": 0.1}
    base = torch.optim.SGD(reference_model.parameters(), **momentum)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what torch's own combination says is not our matter
        expected_schedule = SCHEDULERS[name](base)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fam = FAM(model.parameters(), torch.optim.SGD, model.head, LAM, **momentum)
        schedule = SCHEDULERS[name](fam)
        rates = []
        for step in range(STEPS):
            x, y = batch(step)
            loss = style(model, fam, x, y)
            expected = plain_step(reference_model, base, x, y)
            if name == "ReduceLROnPlateau":
                schedule.step(loss.detach())
                expected_schedule.step(loss.detach())
            else:
                schedule.step()
                expected_schedule.step()
            for key in ("lr", "momentum"):
                assert fam.param_groups[0][key] == base.param_groups[0][key], f"{key} after step {step}"
            assert fam.base_optimizer.param_groups[0]["lr"] == fam.param_groups[0]["lr"]
            rates.append((fam.param_groups[0]["lr"], fam.param_groups[0]["momentum"]))
            assert torch.isfinite(expected)
    assert len({lr for lr, _ in rates}) > 1, "the schedule changed nothing"
    assert (len({m for _, m in rates}) > 1) == (name == "OneCycleLR")
    assert_close(model.parameters(), reference_model.parameters(), "weights", 1e-10)


def test_schedule_survives_a_checkpoint() -> None:
    def build() -> tuple[Net, FAM, Any]:
        model = Net()
        fam = FAM(model.parameters(), torch.optim.SGD, model.head, LAM, lr=0.1, momentum=0.9)
        return model, fam, lr_scheduler.OneCycleLR(fam, max_lr=0.3, total_steps=8)

    model, fam, schedule = build()
    for step in range(6):
        if step == 3:
            saved = copy.deepcopy((model.state_dict(), fam.state_dict(), schedule.state_dict()))
        returns_loss(model, fam, *batch(step))
        schedule.step()
    resumed, other, other_schedule = build()
    for part, state in zip((resumed, other, other_schedule), saved, strict=True):
        part.load_state_dict(state)
    for step in range(3, 6):
        returns_loss(resumed, other, *batch(step))
        other_schedule.step()
    assert_same(resumed.parameters(), model.parameters(), "weights")
    assert other.param_groups[0]["lr"] == fam.param_groups[0]["lr"]


@pytest.mark.parametrize("on", ["fam", "base"])
def test_hooks_fire_once_under_a_scheduler(on: str) -> None:
    """Schedulers replace the step of the optimizer they are given; hooks and labels must not double."""
    model = Net()
    fam = FAM(model.parameters(), torch.optim.SGD, model.head, LAM, lr=0.1)
    schedule = lr_scheduler.StepLR(fam if on == "fam" else fam.base_optimizer, 1, 0.5)
    fired = []
    fam.register_step_pre_hook(lambda *_: fired.append("pre"))
    fam.register_step_post_hook(lambda *_: fired.append("post"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(2):
            returns_loss(model, fam, *batch(step))
            schedule.step()
    assert fired == ["pre", "post"] * 2
    assert fam.param_groups[0]["lr"] == pytest.approx(0.025)


# ------------------------------------------------------------------------- averages of the weights

AVERAGES: dict[str, dict[str, Any]] = {
    "SWA": {},
    "EMA": {"multi_avg_fn": swa_utils.get_ema_multi_avg_fn(0.9)},
    "EMA with buffers": {"multi_avg_fn": swa_utils.get_ema_multi_avg_fn(0.5), "use_buffers": True},
}


@by_style
@pytest.mark.parametrize("kind", AVERAGES)
def test_averaged_model(kind: str, style: Style) -> None:
    model, reference_model = Net(), Net()
    fam = FAM(model.parameters(), torch.optim.SGD, model.head, LAM, lr=0.1)
    base = torch.optim.SGD(reference_model.parameters(), lr=0.1)
    # Made after FAM: the copy brings FAM's hook along, which must do nothing in it.
    average = swa_utils.AveragedModel(model, **AVERAGES[kind])
    expected = swa_utils.AveragedModel(reference_model, **AVERAGES[kind])
    for step in range(4):
        x, y = batch(step)
        style(model, fam, x, y)
        plain_step(reference_model, base, x, y)
        average.update_parameters(model)
        expected.update_parameters(reference_model)
        # Its forward in the middle of training, with a graph: neither observed nor regularised.
        kappa = fam.last_kappa
        F.cross_entropy(average(x), y).backward()
        assert fam.last_kappa is kappa
    assert_close(average.module.parameters(), expected.module.parameters(), "the average", 1e-11)
    swa_utils.update_bn([batch(0)], average)
    x, _ = batch(9)
    assert_close([average(x)], [expected(x)], "the average's output", 1e-11)


# --------------------------------------------------------------------------------- hooks and labels


@by_style
def test_profiler_labels_a_step_once(style: Style) -> None:
    model = Net()
    fam = FAM(model.parameters(), torch.optim.SGD, model.head, LAM, lr=0.1)
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        style(model, fam, *batch(0))
    labels = {e.key: e.count for e in profiled.key_averages() if e.key.startswith("Optimizer.")}
    assert labels == {"Optimizer.step#FAM.step": 1, "Optimizer.zero_grad#SGD.zero_grad": 1}


# ------------------------------------------------------------------- implementations of the update

IMPLEMENTATIONS = {
    f"{make.__name__} {implementation}": (make, {"lr": 0.02, implementation: True, **kwargs})
    for make, kwargs in (
        (torch.optim.SGD, {"momentum": 0.9, "weight_decay": 1e-3}),
        (torch.optim.Adam, {"weight_decay": 1e-3}),
        (torch.optim.AdamW, {"weight_decay": 1e-1, "amsgrad": True}),
        (torch.optim.Adagrad, {}),
    )
    for implementation in ("foreach", "fused", "maximize")
}


@by_style
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_implementations_of_the_base(name: str, style: Style) -> None:
    make, kwargs = IMPLEMENTATIONS[name]
    model, reference_model = Net(), Net()
    fam = FAM(model.parameters(), make, model.head, LAM, **kwargs)
    base = make(reference_model.parameters(), **kwargs)
    for step in range(3):
        x, y = batch(step)
        style(model, fam, x, y)
        plain_step(reference_model, base, x, y)
        assert_close(model.parameters(), reference_model.parameters(), f"weights after step {step}", 1e-10)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch captures on accelerators only")
@by_style
def test_capturable(style: Style) -> None:
    """On accelerators only, as in torch; the state's step count lives on the device then."""
    model, reference_model = Net().cuda(), Net().cuda()
    kwargs = {"lr": 0.02, "capturable": True}
    fam = FAM(model.parameters(), torch.optim.Adam, model.head, LAM, **kwargs)
    base = torch.optim.Adam(reference_model.parameters(), **kwargs)
    for step in range(3):
        x, y = (t.cuda() for t in batch(step))
        style(model, fam, x, y)
        plain_step(reference_model, base, x, y)
        assert_close(model.parameters(), reference_model.parameters(), f"weights after step {step}", 1e-10)
    assert fam.state[model.head.weight]["step"].is_cuda


def test_differentiable_base() -> None:
    """A step of a differentiable base, FAM's penalty included, is differentiated in the learning rate."""
    model = Net()
    x, y = batch(0)
    rate = torch.tensor(0.1, requires_grad=True)

    def loss_at(weights: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(functional_call(model, weights, (x,)), y)

    # Weights that are no leaves, which a differentiable step moves in place.
    weights = {name: p.detach().clone().requires_grad_().clone() for name, p in model.named_parameters()}
    with pytest.warns(UserWarning, match="not among the parameters given to FAM"):
        fam = FAM(weights.values(), torch.optim.SGD, model.head, LAM, lr=rate, differentiable=True)
    regularized = fam.regularize(loss_at(weights))
    steps = torch.autograd.grad(regularized, list(weights.values()), create_graph=True)
    for w, g in zip(weights.values(), steps, strict=True):
        w.grad = g
    fam.step()
    (slope,) = torch.autograd.grad(loss_at(weights), rate)

    # The plain answer: -<gradient of the loss after the step, gradient of loss + lam * kappa before it>.
    def loss() -> Tensor:
        return F.cross_entropy(model(x), y)

    parameters = list(model.parameters())
    before = reference.gradient(loss() + LAM * penalty(loss, model.head), parameters)
    with torch.no_grad():
        for p, g in zip(parameters, before, strict=True):
            p -= 0.1 * g
    after = reference.gradient(loss(), parameters)
    expected = -sum((a * b).sum() for a, b in zip(after, before, strict=True))
    assert_close([slope], [expected], "the derivative in the learning rate", 1e-11)
    assert_close(weights.values(), parameters, "weights")


# ------------------------------------------------------------------------------- several optimizers


class Gan(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.maker = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 5))
            self.critic = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 1))

    def critic_loss(self, x: Tensor, noise: Tensor) -> Tensor:
        real, fake = self.critic(x), self.critic(self.maker(noise).detach())
        return F.softplus(-real).mean() + F.softplus(fake).mean()

    def maker_loss(self, noise: Tensor) -> Tensor:
        return F.softplus(-self.critic(self.maker(noise))).mean()


@pytest.mark.parametrize("style", ["returns loss", "calls backward", "regularize"])
def test_two_networks_two_losses(style: str) -> None:
    """As GANs are trained: the maker's loss runs through the critic, whose kappa is not its own."""
    gan, plain = Gan(), Gan()
    kwargs = {"lr": 0.05, "momentum": 0.5}
    fams = {
        "critic": FAM(gan.critic.parameters(), torch.optim.SGD, gan.critic[2], 0.1, **kwargs),
        "maker": FAM(gan.maker.parameters(), torch.optim.SGD, gan.maker[2], 0.02, **kwargs),
    }
    bases = {
        name: torch.optim.SGD(getattr(plain, name).parameters(), **kwargs) for name in ("critic", "maker")
    }
    for step in range(3):
        x, _ = batch(step)
        noise = torch.randn(8, 2)
        for name, lam in (("critic", 0.1), ("maker", 0.02)):
            fam = fams[name]

            def loss(of: Gan, name: str = name, x: Tensor = x, noise: Tensor = noise) -> Tensor:
                return of.critic_loss(x, noise) if name == "critic" else of.maker_loss(noise)

            def closure(fam: FAM = fam, loss: Callable[[Gan], Tensor] = loss) -> Tensor:
                fam.zero_grad()
                value = loss(gan)
                if style == "calls backward":
                    value.backward()
                return value

            if style == "regularize":
                fam.zero_grad()
                fam.regularize(loss(gan)).backward()
                fam.step()
            else:
                fam.step(closure)
            network = getattr(plain, name)
            kappa = penalty(lambda loss=loss: loss(plain), network[2])  # type: ignore[misc]
            set_gradients(loss(plain) + lam * kappa, list(network.parameters()))
            bases[name].step()
            assert_close([fam.last_kappa], [kappa.detach()], f"kappa of the {name}", 1e-10)
        assert_close(gan.parameters(), plain.parameters(), f"weights after step {step}", 1e-10)


def test_losses_that_do_not_touch_the_layer_pass_through() -> None:
    """One closure, backward of two losses: only the one through the layer is regularised."""
    gan, plain = Gan(), Gan()
    x, _ = batch(0)
    noise = torch.randn(8, 2)
    everything = [*gan.critic.parameters(), *gan.maker.parameters()]
    fam = FAM(everything, torch.optim.SGD, gan.maker[2], 0.1, lr=0.1)

    def closure() -> None:
        fam.zero_grad()
        gan.critic_loss(x, noise).backward()
        gan.maker_loss(noise).backward()

    fam.step(closure)
    kappa = penalty(lambda: plain.maker_loss(noise), plain.maker[2])
    parameters = [*plain.critic.parameters(), *plain.maker.parameters()]
    set_gradients(plain.critic_loss(x, noise) + plain.maker_loss(noise) + 0.1 * kappa, parameters)
    torch.optim.SGD(parameters, lr=0.1).step()
    assert_close(everything, parameters, "weights")


def two_fams(model: Net) -> tuple[FAM, FAM]:
    """Of two layers, with their own weights of kappa, measures and bases."""
    body = FAM(model.body.parameters(), torch.optim.SGD, model.body[0], 0.1, lr=0.1)
    head = FAM(model.head.parameters(), torch.optim.SGD, model.head, 0.03, measure="layerwise", lr=0.2)
    return body, head


def two_penalties(model: Net, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    def loss() -> Tensor:
        return F.cross_entropy(model(x), y)

    return loss(), penalty(loss, model.body[0]), penalty(loss, model.head, "layerwise")


NESTINGS = ["regularize", "the other way round", "closures that return", "closures that call backward"]


@pytest.mark.parametrize("nesting", NESTINGS)
def test_several_fams_on_one_model(nesting: str) -> None:
    """Each adds its own kappa, of the plain loss: one penalty is not regularised by another."""
    model, plain = Net(), Net()
    body, head = two_fams(model)
    for step in range(3):
        x, y = batch(step)

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            body.zero_grad()
            head.zero_grad()
            loss = F.cross_entropy(model(x), y)
            if nesting == "closures that call backward":
                loss.backward()
            return loss

        if nesting.startswith("closures"):
            returned = body.step(lambda closure=closure: head.step(closure))
        else:
            returned = closure()
            first, second = (body, head) if nesting == "regularize" else (head, body)
            regularized = second.regularize(first.regularize(returned))
            assert second.regularize(first.regularize(regularized)) is regularized, "regularised twice"
            regularized.backward()
            first.step()
            second.step()
        loss, kappa_body, kappa_head = two_penalties(plain, x, y)
        set_gradients(loss + 0.1 * kappa_body + 0.03 * kappa_head, list(plain.parameters()))
        torch.optim.SGD([{"params": plain.body.parameters(), "lr": 0.1}], lr=0.1).step()
        torch.optim.SGD([{"params": plain.head.parameters(), "lr": 0.2}], lr=0.1).step()
        assert_close([returned.detach()], [loss.detach()], "the plain loss", 1e-11)
        assert_close([body.last_kappa], [kappa_body.detach()], "kappa of the body", 1e-11)
        assert_close([head.last_kappa], [kappa_head.detach()], "kappa of the head", 1e-11)
        assert_close(model.parameters(), plain.parameters(), f"weights after step {step}", 1e-11)


def test_two_fams_of_the_same_layer() -> None:
    """One forward is recorded once and used twice, whichever steps first."""
    model, plain = Net(), Net()
    layers = [model.body[0], model.head]
    neuronwise = FAM(model.body.parameters(), torch.optim.SGD, model.body[0], 0.1, lr=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the body is trained by the other
        layerwise = FAM(model.head.parameters(), torch.optim.SGD, layers, 0.01, measure="layerwise", lr=0.1)
    for step in range(2):
        x, y = batch(step)
        neuronwise.zero_grad()
        layerwise.zero_grad()
        kept = layerwise.regularize(neuronwise.regularize(F.cross_entropy(model(x), y)))
        kept.backward()
        neuronwise.step()
        layerwise.step()

        def loss(x: Tensor = x, y: Tensor = y) -> Tensor:
            return F.cross_entropy(plain(x), y)

        value = loss() + 0.1 * penalty(loss, plain.body[0])
        value = value + 0.01 * (
            penalty(loss, plain.body[0], "layerwise") + penalty(loss, plain.head, "layerwise")
        )
        set_gradients(value, list(plain.parameters()))
        torch.optim.SGD(plain.parameters(), lr=0.1).step()
        assert_close(model.parameters(), plain.parameters(), f"weights after step {step}", 1e-11)


def test_a_regularised_loss_that_was_changed_is_refused_by_another_fam() -> None:
    model = Net()
    body, head = two_fams(model)
    x, y = batch(0)
    changed = body.regularize(F.cross_entropy(model(x), y)) / 2
    with pytest.raises(RuntimeError, match=r"another FAM.*second.regularize\(first.regularize\(loss / k\)\)"):
        head.regularize(changed)
    # The remedy of the message.
    head.regularize(body.regularize(F.cross_entropy(model(x), y) / 2)).backward()
    expected, kappa_body, kappa_head = two_penalties(Net(), x, y)
    assert_close([2 * t for t in (body.last_kappa, head.last_kappa)], [kappa_body, kappa_head], "kappas")  # type: ignore[operator]
    assert torch.isfinite(expected)


@pytest.mark.parametrize("layer", ["body", "head"])
def test_a_regularised_loss_that_was_changed_is_not_regularised_again(layer: str) -> None:
    """As Lightning does in a closure: it divides what training_step returned, and calls backward."""
    model, plain = Net(), Net()
    of = {"body": lambda m: m.body[0], "head": lambda m: m.head}[layer]
    fam = FAM(model.parameters(), torch.optim.SGD, of(model), LAM, lr=0.1)
    x, y = batch(0)

    def closure() -> Tensor:
        fam.zero_grad()
        total = torch.zeros(())
        for xs, ys in zip(x.split(2), y.split(2), strict=True):
            loss = fam.regularize(F.cross_entropy(model(xs), ys))
            (loss / 4).backward()
            total += loss.detach()
        return total

    fam.step(closure)

    def loss() -> Tensor:
        return F.cross_entropy(plain(x), y)

    set_gradients(loss() + LAM * penalty(loss, of(plain)), list(plain.parameters()))
    torch.optim.SGD(plain.parameters(), lr=0.1).step()
    assert_close(model.parameters(), plain.parameters(), "weights")


def test_two_losses_in_one_step() -> None:
    """kappa of a sum is the sum of kappas, so each loss is regularised by itself."""
    model, plain = Net(), Net()
    fam = FAM(model.parameters(), torch.optim.SGD, model.head, LAM, lr=0.1)
    x, y = batch(0)
    other_x, other_y = batch(1)
    fam.regularize(F.cross_entropy(model(x), y)).backward()
    fam.regularize(0.3 * F.mse_loss(model(other_x), F.one_hot(other_y, 3).double())).backward()
    fam.step()

    def loss() -> Tensor:
        second = F.mse_loss(plain(other_x), F.one_hot(other_y, 3).double())
        return F.cross_entropy(plain(x), y) + 0.3 * second

    set_gradients(loss() + LAM * penalty(loss, plain.head), list(plain.parameters()))
    torch.optim.SGD(plain.parameters(), lr=0.1).step()
    assert_close(model.parameters(), plain.parameters(), "weights")


def test_two_losses_of_one_forward() -> None:
    model, plain = Net(), Net()
    fam = FAM(model.parameters(), torch.optim.SGD, model.head, LAM, lr=0.1)
    x, y = batch(0)

    def closure() -> None:
        z = model(x)
        F.cross_entropy(z, y).backward(retain_graph=True)
        (0.3 * z.square().mean()).backward()

    fam.step(closure)

    def loss() -> Tensor:
        z = plain(x)
        return F.cross_entropy(z, y) + 0.3 * z.square().mean()

    set_gradients(loss() + LAM * penalty(loss, plain.head), list(plain.parameters()))
    torch.optim.SGD(plain.parameters(), lr=0.1).step()
    assert_close(model.parameters(), plain.parameters(), "weights")


# --------------------------------------------------------------------------------- parameter groups


@by_style
def test_parameter_groups_and_one_added_in_training(style: Style) -> None:
    """Fine-tuning: a small rate for the body, which joins after two steps with the head alone."""
    model, plain = Net(), Net()
    for m in (model, plain):
        m.body.requires_grad_(False)
    kwargs = {"lr": 0.1, "momentum": 0.9}
    fam = FAM([{"params": model.head.parameters()}], torch.optim.SGD, model.head, LAM, **kwargs)
    base = torch.optim.SGD([{"params": plain.head.parameters()}], **kwargs)
    schedule, expected = lr_scheduler.ExponentialLR(fam, 0.9), lr_scheduler.ExponentialLR(base, 0.9)
    for step in range(5):
        if step == 2:
            for m, optimizer in ((model, fam), (plain, base)):
                m.body.requires_grad_(True)
                optimizer.add_param_group({"params": m.body.parameters(), "lr": 0.01, "weight_decay": 0.1})
            schedule, expected = lr_scheduler.ExponentialLR(fam, 0.9), lr_scheduler.ExponentialLR(base, 0.9)
        x, y = batch(step)
        style(model, fam, x, y)

        def loss(x: Tensor = x, y: Tensor = y) -> Tensor:
            return F.cross_entropy(plain(x), y)

        set_gradients(
            loss() + LAM * penalty(loss, plain.head), [p for p in plain.parameters() if p.requires_grad]
        )
        base.step()
        schedule.step()
        expected.step()
        assert_close(model.parameters(), plain.parameters(), f"weights after step {step}", 1e-11)
    assert len(fam.param_groups) == 2 and fam.param_groups is fam.base_optimizer.param_groups
    assert not torch.equal(model.body[0].weight, Net().body[0].weight)


# --------------------------------------------------------------------------- modes around and inside


class Records(TorchFunctionMode):
    """Passes everything on, and notes it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("where", ["outside", "inside", "both", "device"])
@pytest.mark.parametrize("style", [returns_loss, calls_backward], ids=["returns loss", "calls backward"])
def test_function_modes_around_the_step_and_in_the_closure(style: Style, where: str) -> None:
    model, clean = Net(), Net()
    fam = FAM(model.parameters(), torch.optim.SGD, model.head, LAM, lr=0.1)
    clean_fam = FAM(clean.parameters(), torch.optim.SGD, clean.head, LAM, lr=0.1)
    x, y = batch(0)
    style(clean, clean_fam, x, y)
    outside, inside = Records(), Records()

    def closure() -> Tensor:
        fam.zero_grad()
        with inside if where in ("inside", "both") else warnings.catch_warnings():
            loss = F.cross_entropy(model(x), y)
            if style is calls_backward:
                loss.backward()
        return loss

    around: Any = {"outside": outside, "both": outside, "device": torch.device("cpu")}.get(
        where, warnings.catch_warnings()
    )
    with around:
        fam.step(closure)
    assert_same(model.parameters(), clean.parameters(), "weights")
    for mode, used in ((outside, where in ("outside", "both")), (inside, where in ("inside", "both"))):
        assert (F.cross_entropy in mode.seen) == used
    assert (Tensor.backward in inside.seen) == (where in ("inside", "both") and style is calls_backward)


def test_zero_grad_and_the_observed_layer_are_shown_to_the_users_modes() -> None:
    """FAM spares its own interception what calls no backward, but not whoever else looks."""
    model = Net()
    fam = FAM(model.parameters(), torch.optim.SGD, model.head, LAM, lr=0.1)
    x, y = batch(0)
    outside, inside = Records(), Records()

    def closure() -> Tensor:
        with inside:
            fam.zero_grad()
        fam.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    with outside:
        fam.step(closure)
    get_gradient = torch.Tensor.grad.__get__  # type: ignore[attr-defined]
    assert get_gradient in inside.seen and get_gradient in outside.seen
    assert fam.last_kappa is not None, "the backward after it was not seen"


def test_a_hook_on_the_loss_scales_kappa_with_the_loss() -> None:
    model, plain = Net(), Net()
    fam = FAM(model.parameters(), torch.optim.SGD, model.head, LAM, lr=0.1)
    x, y = batch(0)
    loss = F.cross_entropy(model(x), y)
    loss.register_hook(lambda gradient: 2 * gradient)
    fam.regularize(loss)

    def expected() -> Tensor:
        return 2 * F.cross_entropy(plain(x), y)

    assert fam.last_kappa is not None
    torch.testing.assert_close(fam.last_kappa, penalty(expected, plain.head).detach())


def test_no_mode_is_left_behind() -> None:
    model = Net()
    fam = FAM(model.parameters(), torch.optim.SGD, model.head, LAM, lr=0.1)
    x, y = batch(0)
    depth = torch._C._len_torch_function_stack()
    calls_backward(model, fam, x, y)
    with pytest.raises(ZeroDivisionError):
        fam.step(lambda: 1 / 0)
    assert torch._C._len_torch_function_stack() == depth
    kappa = fam.last_kappa
    F.cross_entropy(model(x), y).backward()
    assert fam.last_kappa is kappa, "a backward outside of any step was regularised"


# ------------------------------------------------------------------------------------------ threads


@by_style
def test_threads(style: Style) -> None:
    """Networks trained at once, each in its thread, end where they end one after the other."""
    jobs = [("head", "exact"), ("body", "exact"), ("body", "hutchinson"), ("head", "exact")]

    def train(seed: int, model: Net, layer: str, mode: str) -> None:
        of = model.head if layer == "head" else model.body[0]
        generator = torch.Generator().manual_seed(seed)
        fam = FAM(model.parameters(), torch.optim.Adam, of, LAM, mode, generator=generator, lr=0.01)
        for step in range(30):
            style(model, fam, *batch(step + 1000 * seed))

    alone, together = ([Net(seed) for seed in range(len(jobs))] for _ in range(2))
    for seed, job in enumerate(jobs):
        train(seed, alone[seed], *job)
    failures: list[BaseException] = []

    def run(seed: int) -> None:
        try:
            train(seed, together[seed], *jobs[seed])
        except BaseException as error:  # reported below, where pytest sees it
            failures.append(error)

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures
    for seed, job in enumerate(jobs):
        assert_same(together[seed].parameters(), alone[seed].parameters(), f"weights of {job}")
        assert not torch.equal(together[seed].head.weight, Net(seed).head.weight)


def test_nothing_is_left_of_the_optimizers() -> None:
    """After all of it: no hook on a layer that no FAM watches any more."""
    model = Net()
    body, head = two_fams(model)
    x, y = batch(0)
    head.regularize(body.regularize(F.cross_entropy(model(x), y))).backward()
    with observe(model.head) as layer:
        assert torch.isfinite(relative_flatness(F.cross_entropy(model(x), y), layer))
    del body, head, layer
    gc.collect()
    assert not model.body[0]._forward_hooks and not model.head._forward_hooks
