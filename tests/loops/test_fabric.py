"""Lightning Fabric, which wraps the optimizer in a class that inherits from FAM, as Lightning does."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from lightning.fabric import Fabric
from torch import Tensor

from fam_optim import FAM
from tests.support import LAM, SGD, Net, assert_close, by_hand, loader

pytestmark = pytest.mark.usefixtures("float64")


@pytest.mark.parametrize("closure", [False, True], ids=["regularize", "closure"])
def test_fabric(closure: bool) -> None:
    """Fabric wraps the optimizer in a class that inherits from FAM, as Lightning does."""
    fabric = Fabric(accelerator="cpu", devices=1)
    model = Net("batch norm")
    fam = FAM(model.parameters(), torch.optim.SGD, model.head, 0.7, **SGD)
    wrapped, optimizer = fabric.setup(model, fam)
    optimizer.lam = LAM
    for x, y in loader():
        optimizer.zero_grad()

        def evaluate(x: Tensor = x, y: Tensor = y) -> Tensor:
            loss = F.cross_entropy(wrapped(x), y)
            fabric.backward(loss)
            return loss

        if closure:
            optimizer.step(evaluate)
        else:
            fabric.backward(optimizer.regularize(F.cross_entropy(wrapped(x), y)))
            optimizer.step()
    assert_close(model, by_hand(loader()))
