"""The base's own ways: foreach, fused, maximize, capturable, differentiable, parameter groups."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call
from torch.optim import lr_scheduler

from fam_optim import FAM
from tests import reference
from tests.support import (
    LAM,
    ROUNDING,
    TORCH,
    Net,
    Style,
    assert_close,
    batch,
    by_style,
    penalised,
    plain_step,
    set_gradients,
)

pytestmark = pytest.mark.usefixtures("float64")


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


@pytest.mark.skipif(TORCH < (2, 7), reason="torch 2.6 takes no learning rate that is a tensor here")
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
    before = reference.gradient(penalised(loss, model.head), parameters)
    with torch.no_grad():
        for p, g in zip(parameters, before, strict=True):
            p -= 0.1 * g
    after = reference.gradient(loss(), parameters)
    expected = -sum((a * b).sum() for a, b in zip(after, before, strict=True))
    assert_close([slope], [expected], "the derivative in the learning rate", 1e-11)
    assert_close(weights.values(), parameters, "weights", ROUNDING)


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

        set_gradients(penalised(loss, plain.head), [p for p in plain.parameters() if p.requires_grad])
        base.step()
        schedule.step()
        expected.step()
        assert_close(model.parameters(), plain.parameters(), f"weights after step {step}", 1e-11)
    assert len(fam.param_groups) == 2 and fam.param_groups is fam.base_optimizer.param_groups
    assert not torch.equal(model.body[0].weight, Net().body[0].weight)
