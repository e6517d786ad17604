"""FAM's interception of backward beside the user's function modes: nothing is hidden, nothing stays."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fam_optim import FAM
from tests.support import LAM, Net, Style, assert_same, batch, calls_backward, returns_loss

pytestmark = pytest.mark.usefixtures("float64")


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
