"""DDP and FSDP2 alike: processes on their shares of the batch train as one process on the whole.

What is only of one of them is in test_ddp.py and test_fsdp.py, which says with which torch FSDP2 is left out.
"""

from __future__ import annotations

from functools import partial
from itertools import product
from typing import Any

import pytest
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from tests.distributed import (
    DDP,
    FSDP,
    FSDP_RUNS,
    Net,
    Wrap,
    check_gauss_newton,
    check_training,
    compiled,
    each,
    processes,
    squares,
)
from tests.support import STYLES, covering, crossed

WRAPS: dict[str, Wrap] = {
    **{f"DDP {name}": wrap for name, wrap in DDP.items()},
    **{f"FSDP2 {name}": wrap for name, wrap in FSDP.items() if FSDP_RUNS},
}
LAYERS = {"head": ["head"], "middle": ["middle"], "both": ["middle", "head"]}
LOSSES = {"cross_entropy": F.cross_entropy, "squares": squares}
WITH_UNUSED = ("DDP find_unused_parameters", "DDP static_graph")
"""These train a model that has a weight which no loss depends on."""


def train(wrap: str, layers: str, loss: str, style: str, **settings: Any) -> None:
    check_training(WRAPS[wrap], LAYERS[layers], STYLES[style], LOSSES[loss], wrap in WITH_UNUSED, **settings)


def shown(case: tuple[str, ...]) -> list[tuple[Any, ...]]:
    """What may fail together: how a layer's weight lies, and which way kappa takes; and each of them with a
    style."""
    *what, style = case
    return [tuple(what), *((i, part, style) for i, part in enumerate(what))]


@processes(2)
@pytest.mark.parametrize(
    ("wrap", "layers", "loss", "style"), covering(product(WRAPS, LAYERS, LOSSES, STYLES), shown)
)
def test_two_processes(wrap: str, layers: str, loss: str, style: str) -> None:
    train(wrap, layers, loss, style)


OF_FOUR = [name for name in WRAPS if name.startswith("DDP") or name in ("FSDP2 each", "FSDP2 root")]


@processes(4)
@pytest.mark.parametrize(("wrap", "layers", "loss", "style"), crossed(OF_FOUR, LAYERS, LOSSES, STYLES, by=2))
def test_four_processes(wrap: str, layers: str, loss: str, style: str) -> None:
    """The layers' weights have three rows and four: with FSDP2 a process may have none."""
    train(wrap, layers, loss, style)


SETTINGS = {"full": {"mode": "full"}, "detached": {"detach_hessian": True}}


@processes(2)
@pytest.mark.parametrize(
    ("wrap", "layers", "loss", "settings"), crossed(WRAPS, ["head", "middle"], LOSSES, SETTINGS, by=2)
)
def test_settings(wrap: str, layers: str, loss: str, settings: str) -> None:
    train(wrap, layers, loss, "regularize", **SETTINGS[settings])


@processes(2)
@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize("wrap", WRAPS)
def test_gauss_newton(wrap: str, detach: bool) -> None:
    check_gauss_newton(WRAPS[wrap], detach_hessian=detach)


def compiled_within(model: Net) -> Any:
    return DistributedDataParallel(compiled(model))


def compiled_around(wrap: Wrap, model: Net) -> Any:
    return compiled(wrap(model))


def compiled_part(model: Net) -> Any:
    model.body.compile(backend="aot_eager")
    return each(model)


COMPILED: dict[str, tuple[Wrap, str]] = {
    "DDP around a compiled model": (compiled_within, "head"),
    **{f"compiled DDP {name}": (partial(compiled_around, wrap), "head") for name, wrap in DDP.items()},
}
if FSDP_RUNS:
    COMPILED["FSDP2 around a compiled body"] = (compiled_part, "middle")
    COMPILED["compiled FSDP2 each"] = (partial(compiled_around, each), "head")


@processes(2)
@pytest.mark.parametrize(("what", "style"), crossed(COMPILED, ["calls backward", "regularize"], by=1))
def test_compiled(what: str, style: str) -> None:
    wrap, layer = COMPILED[what]
    check_training(wrap, [layer], STYLES[style])
