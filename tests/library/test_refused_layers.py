"""Layers that have no kappa in mode exact are refused by name, with the remedy; and the remedies work."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fam_optim import FAM, observe
from tests.sandwich import Sandwich, assert_step, definition, loss_of
from tests.support import LAM, LR, seeded

pytestmark = pytest.mark.usefixtures("float64")


class Adapted(nn.Module):
    """How PEFT wraps a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.base_layer = nn.Linear(6, 4)
        self.lora_A, self.lora_B = nn.Linear(6, 2, bias=False), nn.Linear(2, 4, bias=False)

    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.lora_B(self.lora_A(x))


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "LoRA wrapper": (Adapted, r"wrapper Adapted.*layer.base_layer.*torch.nn.utils.parametrize"),
    "attention": (lambda: nn.MultiheadAttention(4, 2), r"`layer`.*got MultiheadAttention,.*hutchinson"),
    "bilinear": (lambda: nn.Bilinear(2, 3, 4), r"got Bilinear\(.*hutchinson"),
    "recurrent": (lambda: nn.LSTM(2, 3), r"got LSTM\(2, 3\).*hutchinson"),
}


@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED)
def test_refused_when_named(make: Callable[[], nn.Module], message: str) -> None:
    layer = make()
    with pytest.raises(TypeError, match=message):
        FAM(layer.parameters(), torch.optim.SGD, layer, LAM, lr=LR)
    with pytest.raises(TypeError, match=message):
        observe(layer)
    assert not layer._forward_hooks


def test_base_of_a_lora_wrapper_is_accepted() -> None:
    """As the message says: its own weight counts, the adapter's output is a part of what follows."""

    class Model(Sandwich):
        def __init__(self) -> None:
            super().__init__(make=lambda m, d: Adapted())

    kappa, moved = definition(Model, loss_of, "layer.base_layer")
    model = seeded(Model)
    fam = FAM(model.parameters(), torch.optim.SGD, model.layer.base_layer, LAM, lr=LR)
    fam.step(lambda: loss_of(model))
    assert_step(model, fam, kappa, moved)
