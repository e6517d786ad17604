"""Schedulers drive the base as they drive it alone, through checkpoints and beside hooks."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler, swa_utils

from fam_optim import FAM
from tests.support import (
    LAM,
    Net,
    Style,
    assert_close,
    assert_same,
    batch,
    by_style,
    plain_step,
    returns_loss,
)

pytestmark = pytest.mark.usefixtures("float64")


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
        warnings.filterwarnings("ignore", "The epoch parameter")  # torch 2.6's SequentialLR, of itself
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
