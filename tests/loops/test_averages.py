"""Averages of the weights (SWA, EMA): the copy carries FAM's hook, which must do nothing in it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import swa_utils
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from fam_optim import FAM, observe, relative_flatness
from tests.sandwich import Sandwich, check, data, fam_on, loss_of
from tests.support import (
    LAM,
    LR,
    Net,
    Style,
    assert_close,
    batch,
    by_style,
    plain_step,
    recorded_calls,
    seeded,
)

pytestmark = pytest.mark.usefixtures("float64")


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


def test_averaged_model_is_a_model_like_any_other() -> None:
    """A copy of an observed layer (EMA, SWA) carries the hook, which must do nothing there."""
    model, plain = seeded(Sandwich), seeded(Sandwich)
    fam = fam_on(model)
    average, expected = (AveragedModel(m, multi_avg_fn=get_ema_multi_avg_fn(0.9)) for m in (model, plain))
    for _ in range(3):
        fam.zero_grad()
        fam.step(lambda: loss_of(model))
        average.update_parameters(model)
        plain.load_state_dict(model.state_dict())
        expected.update_parameters(plain)
    x, _ = data()
    for copied in (average, copy.deepcopy(average)):
        copied.eval().requires_grad_(False)
        output = copied(x)
        assert not output.requires_grad, "the copy's output would keep a graph that nobody asked for"
        assert torch.equal(output, expected(x))
        assert not recorded_calls(copied.module.layer)
        with torch.inference_mode():
            assert torch.equal(copied(x), output)
    trained = copy.deepcopy(average).requires_grad_(True)
    fam = FAM(trained.parameters(), torch.optim.SGD, trained.module.layer, LAM, lr=LR)
    fam.regularize(loss_of(trained))
    with observe(expected.module.layer) as layer:
        wanted = relative_flatness(loss_of(expected), layer)
    assert fam.last_kappa is not None
    torch.testing.assert_close(fam.last_kappa, wanted.detach(), rtol=0, atol=0)


def test_loss_of_student_and_averaged_teacher() -> None:
    """The teacher is a copy of the observed student: its calls are not the layer's."""

    def run(model: nn.Module, copier: Callable[[nn.Module], nn.Module]) -> Tensor:
        x, _ = data()
        return F.cross_entropy(model(x), copier(model)(x + 0.1).softmax(1).detach())

    def rebuilt(model: nn.Module) -> nn.Module:
        other = Sandwich()
        other.load_state_dict(model.state_dict())
        return other

    check(Sandwich, partial(run, copier=copy.deepcopy), partial(run, copier=rebuilt))
