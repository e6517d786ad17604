"""The optimizer: its update is the base's on the gradient of loss + lam * kappa, and nothing else changes."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from fam_optim import FAM, observe, relative_flatness
from tests.support import (
    LAM,
    STYLES,
    Net,
    Style,
    assert_close,
    assert_same,
    batch,
    by_style,
    calls_backward,
    recorded_calls,
    regularizes,
    returns_loss,
)

BASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "SGD": (torch.optim.SGD, {"lr": 0.1}),
    "momentum": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-3}),
    "Nesterov": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    "Adam": (torch.optim.Adam, {"lr": 0.01}),
    "AdamW": (torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.1}),
    "Adagrad": (torch.optim.Adagrad, {"lr": 0.05}),
    "RMSprop": (torch.optim.RMSprop, {"lr": 0.01, "momentum": 0.5}),
    "LBFGS": (torch.optim.LBFGS, {"lr": 0.5, "max_iter": 4, "line_search_fn": "strong_wolfe"}),
}


pytestmark = pytest.mark.usefixtures("float64")


def brute_force(model: Net, x: Tensor, y: Tensor, **settings: Any) -> tuple[Tensor, list[Tensor]]:
    """The loss and the gradient of loss + lam * kappa, kappa written out as its definition."""
    loss, objective = loss_and_objective(model, x, y, **settings)
    return loss, list(torch.autograd.grad(objective, list(model.parameters())))


def loss_and_objective(model: Net, x: Tensor, y: Tensor, **settings: Any) -> tuple[Tensor, Tensor]:
    """The loss, and loss + lam * kappa."""
    w = model.head.weight

    def loss_of(weight: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(features, weight, model.head.bias), y)

    features = model.body(x)
    loss = loss_of(w)
    hessian = torch.autograd.functional.hessian(loss_of, w, create_graph=True)
    traces = torch.einsum("stut->su", hessian)
    if settings.get("detach_hessian"):
        traces = traces.detach()
    kappa = (w @ w.T * traces).sum()
    return loss, loss + LAM * kappa


def state_of(model: nn.Module) -> list[Tensor]:
    return [t.clone() for t in model.state_dict().values()]


@pytest.mark.parametrize("detach", [False, True], ids=["whole", "detached"])
@by_style
@pytest.mark.parametrize("base", [b for b in BASES if b != "LBFGS"])
def test_update_is_the_bases_on_the_brute_force_gradient(base: str, style: Style, detach: bool) -> None:
    make, kwargs = BASES[base]
    model = Net("batch norm")
    reference = copy.deepcopy(model)
    fam = FAM(model.parameters(), make, model.head, LAM, detach_hessian=detach, **kwargs)
    plain = make(reference.parameters(), **kwargs)
    for step in range(3):
        x, y = batch(step)
        returned = style(model, fam, x, y)
        loss, gradients = brute_force(reference, x, y, detach_hessian=detach)
        for p, g in zip(reference.parameters(), gradients, strict=True):
            p.grad = g
        plain.step()
        assert_close([returned.detach()], [loss.detach()], "the plain loss is returned")
        assert_close(list(model.parameters()), list(reference.parameters()), f"weights after step {step}")


@pytest.mark.parametrize("style", [returns_loss, calls_backward], ids=["returns loss", "calls backward"])
def test_lbfgs_minimises_the_regularised_loss(style: Style) -> None:
    make, kwargs = BASES["LBFGS"]
    model, reference = Net("relu"), Net("relu")
    fam = FAM(model.parameters(), make, model.head, LAM, **kwargs)
    plain = make(reference.parameters(), **kwargs)
    x, y = batch(0)

    def closure() -> Tensor:
        plain.zero_grad()
        _, objective = loss_and_objective(reference, x, y)
        objective.backward()
        return objective  # whose gradient it is: strong Wolfe compares the two

    for _ in range(3):
        style(model, fam, x, y)
        plain.step(closure)
    assert_close(list(model.parameters()), list(reference.parameters()), "weights", 1e-7)


@pytest.mark.parametrize(
    ("base", "style"),
    [
        pytest.param(base, style, id=f"{base}, {name}")
        for base in BASES
        for name, style in STYLES.items()
        if base != "LBFGS" or style is not regularizes  # LBFGS needs a closure
    ],
)
def test_lam_zero_is_the_base_bit_for_bit(base: str, style: Style) -> None:
    make, kwargs = BASES[base]
    model, reference = Net("batch norm"), Net("batch norm")
    fam = FAM(model.parameters(), make, model.head, 0.0, **kwargs)
    plain = make(reference.parameters(), **kwargs)
    torch.manual_seed(1)
    for step in range(3):
        style(model, fam, *batch(step))
    after = torch.get_rng_state()
    torch.manual_seed(1)
    for step in range(3):
        x, y = batch(step)
        if style is regularizes:
            plain.zero_grad()
            F.cross_entropy(reference(x), y).backward()
            plain.step()
        else:
            calls_backward(reference, plain, x, y)
    assert_same(state_of(model), state_of(reference), "weights and buffers")
    assert torch.equal(after, torch.get_rng_state())
    assert fam.last_kappa is None


def test_lam_zero_builds_no_second_order_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Net("batch norm")
    fam = FAM(model.parameters(), torch.optim.SGD, model.head, 0.0, lr=0.1)
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: pytest.fail("autograd.grad was called"))
    for style in STYLES.values():
        style(model, fam, *batch(0))


def test_last_kappa_is_what_entered_the_penalty() -> None:
    model = Net("batch norm")
    fam = FAM(model.parameters(), torch.optim.SGD, model.head, LAM, normalize=True, lr=0.1)
    x, y = batch(0)
    with observe(model.head) as layer:
        loss = F.cross_entropy(model(x), y)
    expected = relative_flatness(loss, layer) / 6
    regularized = fam.regularize(loss)
    assert fam.last_kappa is not None and not fam.last_kappa.requires_grad
    assert_close([fam.last_kappa], [expected.detach()], "last_kappa")
    assert_close([regularized.detach()], [(loss + LAM * expected).detach()], "loss + lam * kappa")


@by_style
def test_one_forward_one_closure_call_per_step(style: Style) -> None:
    model = Net("batch norm")
    fam = FAM(model.parameters(), torch.optim.Adam, model.head, LAM, lr=0.01)
    calls = 0
    forward = model.forward

    def counted(x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return forward(x)

    model.forward = counted  # type: ignore[method-assign]
    for step in range(4):
        style(model, fam, *batch(step))
    assert calls == 4
    assert model.body[1].num_batches_tracked == 4


def test_several_layers_add_up() -> None:
    model = Net("relu")
    x, y = batch(0)
    both = [model.body[0], model.head]
    fam = FAM(model.parameters(), torch.optim.SGD, both, LAM, lr=0.1)
    fam.regularize(F.cross_entropy(model(x), y))
    parts = []
    for module in both:
        with observe(module) as layer:
            loss = F.cross_entropy(model(x), y)
        parts.append(relative_flatness(loss, layer).detach())
    assert fam.last_kappa is not None
    assert_close([fam.last_kappa], [sum(parts)], "sum of kappas")


def test_parameter_as_layer() -> None:
    model = Net("relu")
    x, y = batch(0)
    fam = FAM(model.parameters(), torch.optim.SGD, model.head.weight, LAM, mode="full", lr=0.1)
    reference = copy.deepcopy(model)
    returns_loss(model, fam, x, y)
    _, gradients = brute_force(reference, x, y)
    moved = [p - 0.1 * g for p, g in zip(reference.parameters(), gradients, strict=True)]
    assert_close(list(model.parameters()), moved, "weights")


def test_accumulation_equals_the_full_batch() -> None:
    model = Net("relu")
    fam = FAM(model.parameters(), torch.optim.SGD, model.head, LAM, lr=0.1)
    x, y = batch(0)

    def gradients(parts: int, inside: bool) -> list[Tensor]:
        fam.zero_grad()
        found: list[Tensor] = []

        def closure() -> None:
            for xs, ys in zip(x.chunk(parts), y.chunk(parts), strict=True):
                loss = F.cross_entropy(model(xs), ys) / parts
                (loss if inside else fam.regularize(loss)).backward()
            found.extend(p.grad.clone() for p in model.parameters())  # type: ignore[union-attr]
            raise KeyboardInterrupt  # gradients only: leave the weights

        with pytest.raises(KeyboardInterrupt):
            fam.step(closure)
        return found

    whole = gradients(1, inside=True)
    assert_close(gradients(4, inside=True), whole, "four backwards in one closure", 1e-12)
    assert_close(gradients(4, inside=False), whole, "four regularize calls", 1e-12)


def test_regularized_loss_is_not_regularized_twice() -> None:
    model, reference = Net("batch norm"), Net("batch norm")
    make = {"lr": 0.1}
    fam = FAM(model.parameters(), torch.optim.SGD, model.head, LAM, **make)
    other = FAM(reference.parameters(), torch.optim.SGD, reference.head, LAM, **make)
    x, y = batch(0)

    def closure() -> Tensor:
        loss = fam.regularize(F.cross_entropy(model(x), y))
        (2 * loss / 2).backward()  # as Lightning does: it divides by the number of micro-batches
        return loss

    fam.step(closure)
    regularizes(reference, other, x, y)
    assert_close(list(model.parameters()), list(reference.parameters()), "weights")


def test_losses_elsewhere_pass_through_untouched() -> None:
    model, critic = Net("batch norm"), nn.Linear(5, 1)
    fam = FAM([*model.parameters(), *critic.parameters()], torch.optim.SGD, model.head, LAM, lr=0.1)
    x, y = batch(0)

    def closure() -> None:
        critic(x).square().mean().backward()
        F.cross_entropy(model(x), y).backward()

    expected = torch.autograd.grad(critic(x).square().mean(), critic.weight)[0]
    fam.step(closure)
    assert_close([critic.weight.grad], [expected], "the critic's gradient")  # type: ignore[list-item]


def test_gradient_argument_of_backward_is_kept() -> None:
    model = Net("relu")
    fam = FAM(model.parameters(), torch.optim.SGD, model.head, LAM, lr=0.1)
    x, y = batch(0)
    _, expected = brute_force(model, x, y)

    def closure() -> None:
        F.cross_entropy(model(x), y).backward(torch.tensor(3.0))
        for p, e in zip(model.parameters(), expected, strict=True):
            assert_close([p.grad], [3 * e], "gradient")  # type: ignore[list-item]

    fam.step(closure)


# State


@pytest.mark.parametrize("base", ["momentum", "Adam", "LBFGS"])
@pytest.mark.parametrize("mode", ["exact", "hutchinson"])
def test_resume_is_bit_for_bit(base: str, mode: str) -> None:
    make, kwargs = BASES[base]

    def build(seed: int) -> tuple[Net, FAM]:
        model = Net("batch norm", seed)
        generator = torch.Generator().manual_seed(seed)
        return model, FAM(
            model.parameters(), make, model.head, LAM, mode, n_samples=2, generator=generator, **kwargs
        )

    model, fam = build(0)
    for step in range(3):
        returns_loss(model, fam, *batch(step))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": fam.state_dict()}, file)
    for step in range(3, 6):
        returns_loss(model, fam, *batch(step))

    resumed, optimizer = build(1)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    for step in range(3, 6):
        returns_loss(resumed, optimizer, *batch(step))
    assert_same(state_of(resumed), state_of(model), "weights after resuming")


def test_checkpoints_pass_between_fam_and_its_base() -> None:
    model = Net("batch norm")
    fam = FAM(model.parameters(), torch.optim.Adam, model.head, LAM, lr=0.01)
    returns_loss(model, fam, *batch(0))
    plain = torch.optim.Adam(model.parameters(), lr=0.5)
    plain.load_state_dict(fam.state_dict())
    assert plain.param_groups[0]["lr"] == 0.01
    assert_same(
        [plain.state[model.head.weight]["exp_avg"]], [fam.state[model.head.weight]["exp_avg"]], "state"
    )
    other = FAM(model.parameters(), torch.optim.Adam, model.head, 0.7, lr=0.5)
    other.load_state_dict(plain.state_dict())
    assert other.lam == 0.7 and other.param_groups[0]["lr"] == 0.01
    other.load_state_dict(fam.state_dict())
    assert other.lam == LAM


@pytest.mark.parametrize(
    "copier", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["copy", "pickle"]
)
def test_copies_are_independent_and_work(copier: Callable[[Any], Any]) -> None:
    model = Net("batch norm")
    fam = FAM(model.parameters(), torch.optim.SGD, model.head, LAM, lr=0.1, momentum=0.9)
    returns_loss(model, fam, *batch(0))
    twin, optimizer = copier((model, fam))
    assert optimizer.param_groups[0]["params"][0] is next(twin.parameters())
    for step in range(1, 3):
        returns_loss(model, fam, *batch(step))
        returns_loss(twin, optimizer, *batch(step))
    assert_same(state_of(twin), state_of(model), "the copy's weights")
    assert twin.head.weight is not model.head.weight


def test_model_can_be_saved_and_copied_without_growing_hooks() -> None:
    model = Net("batch norm")
    for _ in range(4):
        fam = FAM(model.parameters(), torch.optim.SGD, model.head, LAM, lr=0.1)
        returns_loss(model, fam, *batch(0))
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        model = torch.load(file, weights_only=False)
        assert not model.head._forward_hooks, "a copy has none"
    del fam
    gc.collect()
    plain = copy.deepcopy(model)
    with observe(plain.head):
        assert len(plain.head._forward_hooks) == 1
    assert len(plain.head._forward_hooks) == 0


def test_state_groups_and_defaults_are_the_bases_own() -> None:
    model = Net("batch norm")
    fam = FAM(model.parameters(), torch.optim.SGD, model.head, LAM, lr=0.1)
    assert isinstance(fam, torch.optim.Optimizer)
    for name in ("state", "param_groups", "defaults"):
        assert getattr(fam, name) is getattr(fam.base_optimizer, name)
        replacement = copy.copy(getattr(fam, name))
        setattr(fam, name, replacement)
        assert getattr(fam.base_optimizer, name) is replacement
    with pytest.raises(AttributeError):
        fam._step_supports_amp_scaling  # noqa: B018
    extra = nn.Parameter(torch.zeros(2))
    fam.add_param_group({"params": [extra], "lr": 0.5})
    assert fam.base_optimizer.param_groups[-1]["lr"] == 0.5
    extra.grad = torch.ones(2)
    fam.zero_grad()
    assert extra.grad is None


def test_scheduler_drives_the_base_without_warning() -> None:
    model = Net("batch norm")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fam = FAM(model.parameters(), torch.optim.SGD, model.head, LAM, lr=0.1, momentum=0.9)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(fam, T_max=4)
        for step in range(4):
            returns_loss(model, fam, *batch(step))
            scheduler.step()
    assert fam.base_optimizer.param_groups[0]["lr"] == pytest.approx(0.0)


def test_hooks_fire_once_and_see_fam() -> None:
    model = Net("batch norm")
    fam = FAM(model.parameters(), torch.optim.SGD, model.head, LAM, lr=0.1)
    seen: list[tuple[str, Any]] = []
    handles = [
        fam.register_step_pre_hook(lambda o, a, k: seen.append(("pre", o))),
        fam.register_step_post_hook(lambda o, a, k: seen.append(("post", o))),
        register_optimizer_step_pre_hook(lambda o, a, k: seen.append(("global", o))),
        fam.register_state_dict_pre_hook(lambda o: seen.append(("save", o))),
        fam.register_state_dict_post_hook(lambda o, s: seen.append(("saved", o))),
        fam.register_load_state_dict_pre_hook(lambda o, s: seen.append(("load", o))),
        fam.register_load_state_dict_post_hook(lambda o: seen.append(("loaded", o))),
    ]
    try:
        returns_loss(model, fam, *batch(0))
        fam.load_state_dict(fam.state_dict())
    finally:
        for handle in handles:
            handle.remove()
    assert sorted(name for name, _ in seen) == sorted(
        ["pre", "post", "global", "save", "saved", "load", "loaded"]
    )
    assert all(optimizer is fam for _, optimizer in seen)


# Nothing is lost, nothing grows


@pytest.mark.parametrize(("base", "fail_at"), [("momentum", 1), ("Adam", 1), ("LBFGS", 1), ("LBFGS", 3)])
def test_failing_closure_leaves_everything_as_it_was(base: str, fail_at: int) -> None:
    make, kwargs = BASES[base]
    model, reference = Net("relu"), Net("relu")
    fam = FAM(model.parameters(), make, model.head, LAM, **kwargs)
    clean = FAM(reference.parameters(), make, reference.head, LAM, **kwargs)
    returns_loss(model, fam, *batch(0))
    returns_loss(reference, clean, *batch(0))
    before, hooks = state_of(model), len(model.head._forward_hooks)
    state = copy.deepcopy(fam.state_dict())
    calls = 0

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        fam.zero_grad()
        x, y = batch(1)
        loss = F.cross_entropy(model(x), y)
        if calls == fail_at:
            raise OSError("no more data")
        return loss

    with pytest.raises(OSError, match="no more data"):
        fam.step(closure)
    assert calls == fail_at
    assert_same(state_of(model), before, "weights")
    assert len(model.head._forward_hooks) == hooks
    assert pickle.dumps(fam.state_dict()["param_groups"]) == pickle.dumps(state["param_groups"])
    returns_loss(model, fam, *batch(1))
    returns_loss(reference, clean, *batch(1))
    assert_same(state_of(model), state_of(reference), "weights after the next step")


def live_floats() -> int:
    gc.collect()
    return sum(o.numel() for o in gc.get_objects() if type(o) in (Tensor, nn.Parameter))


@pytest.mark.parametrize("kept", [False, True], ids=["losses dropped", "losses kept"])
@by_style
def test_memory_is_flat(style: Style, kept: bool) -> None:
    model = Net("batch norm")
    fam = FAM(model.parameters(), torch.optim.SGD, model.head, LAM, lr=0.01)
    losses: list[Any] = []
    counts = []
    for step in range(200):
        loss = style(model, fam, *batch(step))
        if kept:
            losses.append(loss)  # a common mistake, which costs a scalar and must not cost a feature map
        del loss
        if step in (50, 199):
            counts.append(live_floats() - len(losses))
    assert counts[1] <= counts[0] + 8, f"{counts[1] - counts[0]} more numbers alive after 150 steps"


def test_forwards_that_are_never_regularized_do_not_pile_up() -> None:
    model = Net("batch norm")
    fam = FAM(model.parameters(), torch.optim.SGD, model.head, LAM, lr=0.01)
    x, y = batch(0)
    for _ in range(50):
        F.cross_entropy(model(x), y)
    gc.collect()
    assert not recorded_calls(model.head)
    with torch.no_grad():
        model(x)
    assert not recorded_calls(model.head)
    returns_loss(model, fam, x, y)


def test_hook_goes_with_the_optimizer() -> None:
    model = Net("batch norm")
    fam = FAM(model.parameters(), torch.optim.SGD, model.head, LAM, lr=0.01)
    second = FAM(model.parameters(), torch.optim.SGD, model.head, LAM, lr=0.01)
    assert len(model.head._forward_hooks) == 1
    del fam
    gc.collect()
    assert len(model.head._forward_hooks) == 1
    returns_loss(model, second, *batch(0))
    del second
    gc.collect()
    assert len(model.head._forward_hooks) == 0


@pytest.mark.parametrize("mode", ["exact", "full"])
def test_no_random_numbers_are_drawn(mode: str) -> None:
    model = Net("relu")
    fam = FAM(model.parameters(), torch.optim.SGD, [model.body[0], model.head], LAM, mode, lr=0.1)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    returns_loss(model, fam, *batch(0))
    assert torch.equal(before, torch.get_rng_state())


def test_schedulers_built_on_the_base_work_too() -> None:
    model = Net("batch norm")
    fam = FAM(model.parameters(), torch.optim.SGD, model.head, LAM, lr=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduler = torch.optim.lr_scheduler.StepLR(fam.base_optimizer, 1, 0.5)
        returns_loss(model, fam, *batch(0))
        scheduler.step()
    assert fam.param_groups[0]["lr"] == 0.05
