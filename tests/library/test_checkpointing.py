"""Activation checkpoints and offloading change nothing; a reentrant checkpoint over the layer is refused."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint_sequential

from fam_optim import FAM
from tests.sandwich import MODES, WHERE, Sandwich, check, checkpointed, data, fam_on, loss_of
from tests.support import LAM, LR, seeded

pytestmark = pytest.mark.usefixtures("float64")


@MODES
@WHERE
@pytest.mark.parametrize(
    ("part", "reentrant"),
    [
        *[(part, False) for part in ("body", "layer", "tail", "loss", "everything")],
        ("body", True),
    ],
)
def test_activation_checkpoint_changes_nothing(part: str, reentrant: bool, head: bool, mode: str) -> None:
    model = check(partial(Sandwich, head), checkpointed(part, reentrant), loss_of, mode)
    plain = seeded(partial(Sandwich, head))
    fam_on(plain, mode).step(lambda: loss_of(plain))
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(p, q), (
            f"{name} differs from the run without checkpoint by {(p - q).abs().max():.1e}"
        )


@MODES
@WHERE
@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("layer", r"`layer` Linear\(in_features=6.* outside reentrant.*use_reentrant=False"),
        ("everything", r"`layer` Linear\(in_features=6.* outside reentrant.*use_reentrant=False"),
        ("loss", r"Reentrant activation checkpointing.*use_reentrant=False"),
    ],
)
def test_reentrant_checkpoint_over_the_layer_or_its_tail_is_refused(
    part: str, message: str, head: bool, mode: str
) -> None:
    model = seeded(partial(Sandwich, head))
    before = copy.deepcopy(model.state_dict())
    fam, run = fam_on(model, mode), checkpointed(part, True)
    with pytest.raises(RuntimeError, match=message):
        fam.step(lambda: run(model))
    with pytest.raises(RuntimeError, match=message):
        fam.regularize(run(model))
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_reentrant_checkpoint_over_a_bare_parameter_is_refused() -> None:
    model = seeded(Sandwich)
    fam = FAM(model.parameters(), torch.optim.SGD, model.layer.weight, LAM, "full", lr=LR)
    with pytest.raises(RuntimeError, match=r"Parameter of shape \(4, 6\) outside reentrant"):
        fam.regularize(checkpointed("layer", True)(model))


def test_checkpointed_dropout_is_recomputed_alike() -> None:
    """The masks of body and tail are drawn once, whatever is recomputed for kappa."""

    class Dropped(Sandwich):
        def __init__(self) -> None:
            super().__init__()
            self.body.append(nn.Dropout(0.3))
            self.tail.append(nn.Dropout(0.3))

    def run(model: nn.Module, save: bool) -> Tensor:
        torch.manual_seed(3)
        return (checkpointed("everything", False) if save else loss_of)(model)

    check(Dropped, partial(run, save=True), partial(run, save=False))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_segments_of_the_body(reentrant: bool) -> None:
    x, y = data()
    x.requires_grad_()

    def run(model: nn.Module) -> Tensor:
        phi = checkpoint_sequential(model.body, 2, x, use_reentrant=reentrant)
        return F.cross_entropy(model.tail(model.layer(phi)), y)

    check(Sandwich, run, loss_of)


# ----------------------------------------------------------------------------------------- offloading


def to_file(t: Tensor) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(t.detach(), file)
    return file


def from_file(file: io.BytesIO) -> Tensor:
    file.seek(0)
    return torch.load(file)


OFFLOADING: dict[str, Callable[[], Any]] = {
    "save_on_cpu": torch.autograd.graph.save_on_cpu,
    "own hooks": partial(torch.autograd.graph.saved_tensors_hooks, to_file, from_file),
}


@MODES
@WHERE
@pytest.mark.parametrize("offload", OFFLOADING.values(), ids=OFFLOADING)
def test_offloaded_activations(offload: Callable[[], Any], head: bool, mode: str) -> None:
    def run(model: nn.Module) -> Tensor:
        with offload():
            return loss_of(model)

    check(partial(Sandwich, head), run, loss_of, mode)
