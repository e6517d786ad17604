"""Micro-batches add up to the full batch, penalty included; what is clipped is the gradient of both."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fam_optim import FAM
from tests.support import (
    LAM,
    ROUNDING,
    Net,
    Style,
    assert_close,
    batch,
    calls_backward,
    gradients,
    penalised,
    regularizes,
    returns_loss,
    set_gradients,
    true_kappa,
)

pytestmark = pytest.mark.usefixtures("float64")


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
        set_gradients(value + LAM * true_kappa(whole, of(reference_model)), reference_model.parameters())
        assert_close(gradients(model), gradients(reference_model), f"gradients of step {step}", ROUNDING)
        base.step()
        assert_close(model.parameters(), reference_model.parameters(), f"weights after step {step}", ROUNDING)
        assert_close([returned], [value.detach()], "the closure's own loss is returned", ROUNDING)


# ---------------------------------------------------------------------------------- gradient clipping


CLIPPABLE = {"calls backward": calls_backward, "regularize": regularizes}


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

        set_gradients(penalised(loss, reference_model.head), reference_model.parameters())
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

    set_gradients(penalised(loss, reference_model.head), reference_model.parameters())
    assert max(g.abs().max().item() for g in gradients(reference_model)) > 0.02
    nn.utils.clip_grad_value_(reference_model.parameters(), 0.02)
    torch.optim.SGD(reference_model.parameters(), lr=0.1).step()
    assert_close(model.parameters(), reference_model.parameters(), "weights", ROUNDING)
