"""The user's hooks, on modules and on the loss: what they change counts; a step has one label."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from fam_optim import FAM
from tests.sandwich import MODES, Sandwich, assert_step, data, definition, fam_on, loss_of
from tests.support import LAM, Net, Style, batch, by_style, seeded, true_kappa

pytestmark = pytest.mark.usefixtures("float64")


@MODES
@pytest.mark.parametrize("first", ["the user's hook", "FAM"])
def test_output_modified_by_a_forward_hook_belongs_to_the_tail(first: str, mode: str) -> None:
    def modify(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return 2 * output + output.square()

    def run(model: nn.Module) -> Tensor:
        x, y = data()
        z = model.layer(model.body(x))
        return F.cross_entropy(model.tail(2 * z + z.square()), y)

    kappa, moved = definition(Sandwich, run)
    model = seeded(Sandwich)
    if first == "FAM":
        fam = fam_on(model, mode)
        model.layer.register_forward_hook(modify)
    else:
        model.layer.register_forward_hook(modify)
        fam = fam_on(model, mode)
    fam.step(lambda: loss_of(model))
    assert_step(model, fam, kappa, moved)


def test_input_modified_by_a_forward_pre_hook_is_the_input() -> None:
    def build(how: str = "") -> nn.Module:
        model = Sandwich()
        if how == "args":
            model.layer.register_forward_pre_hook(lambda module, args: (args[0].sin(),))
        if how == "kwargs":
            model.layer.register_forward_pre_hook(
                lambda module, args, kwargs: ((), {"input": args[0].sin()}), with_kwargs=True
            )
        return model

    def run(model: nn.Module) -> Tensor:
        x, y = data()
        return F.cross_entropy(model.tail(model.layer(model.body(x).sin())), y)

    for how in ("args", "kwargs"):
        kappa, moved = definition(build, run)
        model = seeded(partial(build, how))
        fam = fam_on(model)
        fam.step(lambda model=model: loss_of(model))
        assert_step(model, fam, kappa, moved)


@pytest.mark.parametrize("where", ["layer", "tail", "body"])
def test_full_backward_hooks_change_nothing(where: str) -> None:
    def build(hook: bool = True) -> nn.Module:
        model = Sandwich()
        model.body[3] = nn.ReLU()  # torch forbids such hooks together with in-place operations
        if hook:
            getattr(model, where).register_full_backward_hook(lambda *args: None)
            getattr(model, where).register_full_backward_pre_hook(lambda *args: None)
        return model

    kappa, moved = definition(partial(build, False), loss_of)
    model = seeded(build)
    fam = fam_on(model)
    x, y = data()
    fam.step(lambda: F.cross_entropy(model(x.requires_grad_()), y))  # or the body's hook warns
    assert_step(model, fam, kappa, moved)


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
    torch.testing.assert_close(fam.last_kappa, true_kappa(expected, plain.head).detach())


@by_style
def test_profiler_labels_a_step_once(style: Style) -> None:
    model = Net()
    fam = FAM(model.parameters(), torch.optim.SGD, model.head, LAM, lr=0.1)
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        style(model, fam, *batch(0))
    labels = {e.key: e.count for e in profiled.key_averages() if e.key.startswith("Optimizer.")}
    assert labels == {"Optimizer.step#FAM.step": 1, "Optimizer.zero_grad#SGD.zero_grad": 1}
