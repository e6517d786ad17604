"""Calls of the layer without gradients (evaluation, pseudo-labels, features): they do not count."""

from __future__ import annotations

import gc

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.sandwich import MODES, Sandwich, assert_step, check, data, definition, fam_on, loss_of
from tests.support import recorded_calls, seeded

pytestmark = pytest.mark.usefixtures("float64")


def test_evaluation_leaves_no_trace() -> None:
    model = seeded(Sandwich)
    fam = fam_on(model)
    kappa, moved = definition(Sandwich, loss_of)
    x, _ = data()
    loss = loss_of(model)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            model(x)
            assert len(recorded_calls(model.layer)) == 1
    fam.regularize(loss).backward()
    fam.step()
    assert_step(model, fam, kappa, moved)
    del loss
    gc.collect()
    assert not recorded_calls(model.layer)


@MODES
def test_outputs_partly_used_without_gradient(mode: str) -> None:
    def run(model: nn.Module) -> Tensor:
        x, y = data()
        z = model.layer(model.body(x))
        with torch.no_grad():
            certain = z.softmax(1).amax(1)
            model.layer(model.body(2 * x))
        mixed = torch.cat([3 * z[:3], z[3:].detach()])
        return (certain * F.cross_entropy(model.tail(mixed), y, reduction="none")).mean()

    check(Sandwich, run, mode=mode)


def test_features_from_inference_mode() -> None:
    """A body run in inference mode, as for a linear probe; torch wants its output cloned."""

    def build() -> nn.Module:
        model = Sandwich()
        model.body.requires_grad_(False)
        return model

    def run(model: nn.Module) -> Tensor:
        x, y = data()
        with torch.inference_mode():
            phi = model.body(x)
        return F.cross_entropy(model.tail(model.layer(phi.clone())), y)

    check(build, run, loss_of)
