"""No step waits for an accelerator, and nothing of it is on the CPU. The meta device stands in for one: its
tensors have no numbers, so that reading one is an error, and so is an operation with a tensor of the CPU."""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fam_optim import FAM, unnoticed, weight_layers
from tests import zoo

if TYPE_CHECKING:
    from collections.abc import Callable


class OnCpu(torch.Generator):
    """What draws for the meta device, which has no generator."""

    def __new__(cls, device: Any = None) -> OnCpu:
        made: OnCpu = super().__new__(cls, "cpu")  # type: ignore[call-arg]
        return made


class Unread:
    """A flag that has not arrived at the host yet."""

    def __init__(self, flag: Tensor) -> None:
        assert flag.device.type == "meta"

    def read(self) -> None:
        return None


@pytest.fixture(autouse=True)
def meta(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "Generator", OnCpu)
    monkeypatch.setattr(unnoticed, "AsyncFlag", Unread)


NETS: dict[str, Callable[[], nn.Sequential]] = {
    "perceptron": lambda: nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 64), nn.Linear(64, 10)),
    "convolutions": lambda: nn.Sequential(
        *(nn.Unflatten(1, (5, 2, 2)), nn.Conv2d(5, 8, 1), nn.BatchNorm2d(8), nn.GELU()),
        *(nn.ConvTranspose2d(8, 8, 2), nn.Flatten(), nn.Linear(72, 10)),
    ),
    "attention": lambda: nn.Sequential(
        *(nn.Unflatten(1, (5, 4)), nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), nn.Flatten()),
        nn.Linear(20, 10),
    ),
}
LOSSES: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (
    lambda o, y: F.cross_entropy(o, y, label_smoothing=0.1),
    lambda o, y: F.binary_cross_entropy_with_logits(o, F.one_hot(y, 10).to(o)),
    lambda o, y: (o - F.one_hot(y, 10)).square().mean(),
)


def batch(n: int = 16) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 20, device="meta"), torch.zeros(n, dtype=torch.long, device="meta")


@pytest.mark.parametrize("make", NETS.values(), ids=NETS)
def test_a_due_proximal_step(make: Callable[[], nn.Sequential]) -> None:
    """Of rows and of the weights' gradient, by a closure and without, with micro-batches and clipping."""
    model = make().to("meta")
    optimizer = FAM.for_model(model, torch.optim.SGD, every=1, lr=0.1, momentum=0.9)
    for loss, n in product(LOSSES, (16, 128)):
        x, y = batch(n)
        optimizer.zero_grad()
        optimizer.step(lambda loss=loss, x=x, y=y: loss(model(x), y))
        for set_to_none in (True, False):
            optimizer.zero_grad(set_to_none)
            for _ in range(3):
                (optimizer.regularize(loss(model(x), y)) / 3).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
    assert optimizer.last_kappa is not None and optimizer.last_kappa.device.type == "meta"


PENALTIES: dict[str, tuple[Callable[[nn.Sequential], Any], dict[str, Any]]] = {
    "last": (lambda model: model[-1], {}),
    "exact": (lambda model: weight_layers(model)[-2], {"detach_hessian": True}),
    "hutchinson": (lambda model: weight_layers(model)[-2], {"mode": "hutchinson", "detach_hessian": True}),
    "parameter": (lambda model: model[-1].weight, {"mode": "hutchinson", "n_samples": 2}),
    "all": (weight_layers, {"mode": "hutchinson", "curvature": "gauss_newton", "detach_hessian": True}),
}


@pytest.mark.parametrize(("layer", "options"), PENALTIES.values(), ids=PENALTIES)
def test_a_step_with_a_penalty(
    layer: Callable[[nn.Sequential], Any], options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = NETS["convolutions"]().to("meta")
    optimizer = FAM(model.parameters(), torch.optim.SGD, layer(model), lr=0.1, **options)
    x, y = batch()
    for _ in range(2):
        optimizer.zero_grad()
        optimizer.step(lambda: F.cross_entropy(model(x), y))
        optimizer.zero_grad()
        optimizer.regularize(F.cross_entropy(model(x), y)).backward()
        optimizer.step()
    monkeypatch.undo()
    with pytest.raises(RuntimeError, match="cannot be called on meta tensors"):  # what would be if it waited
        bool(optimizer.last_kappa)


def test_a_due_step_of_a_published_network() -> None:
    row = next(row for row in zoo.ROWS if row.name == "timm-xcit")
    model, inputs = row.build().float().to("meta"), {k: v.to("meta") for k, v in row.batch().items()}
    inputs["x"] = inputs["x"].float()
    optimizer = FAM.for_model(model, torch.optim.AdamW, every=1, lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        optimizer.regularize(row.loss(model, inputs)[0]).backward()
        optimizer.step()
    assert optimizer.last_kappa is not None
