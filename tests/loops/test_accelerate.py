"""Accelerate with the README's loop: accumulation, clipping, a closure, low precision, resuming.

The real package against the plain mathematical answer (`tests.support.by_hand`).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fam_optim import FAM, observe, relative_flatness
from tests.support import LAM, SGD, Batch, Net, assert_close, assert_same, by_hand, loader

pytestmark = pytest.mark.usefixtures("float64", "fresh_accelerate")


def accelerated(
    batches: int = 4, accumulate: int = 1, clip: float | None = None, closure: bool = False, **kwargs: Any
) -> nn.Module:
    """The loop of the README."""
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=accumulate, **kwargs)
    model = Net("batch norm")
    fam = FAM(model.parameters(), torch.optim.SGD, model.head, LAM, **SGD)
    model, optimizer, batches_of = accelerator.prepare(model, fam, loader(batches))
    for x, y in batches_of:
        with accelerator.accumulate(model):

            def evaluate(x: Tensor = x, y: Tensor = y) -> Tensor:
                optimizer.zero_grad()
                loss = F.cross_entropy(model(x), y)
                accelerator.backward(loss)
                return loss

            if closure:
                optimizer.step(evaluate)
                continue
            accelerator.backward(fam.regularize(F.cross_entropy(model(x), y)))
            if clip is not None and accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()
    return accelerator.unwrap_model(model)


@pytest.mark.parametrize("accumulate", [1, 2, 4])
@pytest.mark.parametrize("clip", [None, 0.1])
def test_accelerate(accumulate: int, clip: float | None) -> None:
    model = accelerated(8, accumulate, clip)
    assert_close(model, by_hand(loader(8), accumulate, clip))


def test_accelerate_with_a_closure() -> None:
    assert_close(accelerated(closure=True), by_hand(loader()))


def test_accelerate_in_bfloat16() -> None:
    torch.set_default_dtype(torch.float32)
    model = accelerated(mixed_precision="bf16")
    plain = Net("batch norm")
    optimizer = torch.optim.SGD(plain.parameters(), **SGD)
    for x, y in loader():
        with observe(plain.head) as layer:
            with torch.autocast("cpu", torch.bfloat16):
                z = plain(x)
            loss = F.cross_entropy(z.float(), y)
        optimizer.zero_grad()
        (loss + LAM * relative_flatness(loss, layer)).backward()
        optimizer.step()
    assert z.dtype == torch.bfloat16
    assert_same(model, plain)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_accelerate_in_float16() -> None:
    torch.set_default_dtype(torch.float32)
    accelerator = accelerate.Accelerator(mixed_precision="fp16")
    model = Net("batch norm")
    fam = FAM(model.parameters(), torch.optim.SGD, model.head, LAM, **SGD)
    model, optimizer, batches = accelerator.prepare(model, fam, loader())
    for x, y in batches:
        accelerator.backward(fam.regularize(F.cross_entropy(model(x), y)))
        optimizer.step()
        optimizer.zero_grad()
    assert not optimizer.step_was_skipped
    assert_close(
        accelerator.unwrap_model(model).cpu(), by_hand(loader()), tolerance=torch.finfo(torch.float16).eps
    )


def test_accelerate_without_regularize_is_refused() -> None:
    accelerator = accelerate.Accelerator(cpu=True)
    model = Net("batch norm")
    fam = FAM(model.parameters(), torch.optim.SGD, model.head, LAM, **SGD)
    model, optimizer, batches = accelerator.prepare(model, fam, loader())
    x, y = next(iter(batches))
    accelerator.backward(F.cross_entropy(model(x), y))
    with pytest.raises(RuntimeError, match=r"regularize\(\) was not called since the last step"):
        optimizer.step()


def test_accelerate_resumes_bit_for_bit(tmp_path: Path) -> None:
    accelerator = accelerate.Accelerator(cpu=True)

    generators: list[torch.Generator] = []

    def build() -> tuple[Any, Any, FAM]:
        model = Net("batch norm")
        generators.append(torch.Generator().manual_seed(3))
        probes: dict[str, Any] = {"mode": "hutchinson", "generator": generators[-1]}
        fam = FAM(model.parameters(), torch.optim.Adam, model.head, LAM, **probes, lr=0.01)
        return *accelerator.prepare(model, fam), fam

    def train(model: Any, optimizer: Any, fam: FAM, batches: Iterable[Batch]) -> None:
        for x, y in batches:
            optimizer.zero_grad()
            accelerator.backward(fam.regularize(F.cross_entropy(model(x), y)))
            optimizer.step()

    whole = build()
    train(*whole, itertools.islice(loader(), 2))
    accelerator.save_state(str(tmp_path / "state"))
    train(*whole, itertools.islice(loader(), 2, 4))
    accelerator.free_memory()
    resumed = build()
    nn.init.zeros_(resumed[0].head.weight)
    generators[1].manual_seed(5)
    accelerator.load_state(str(tmp_path / "state"))
    train(*resumed, itertools.islice(loader(), 2, 4))
    assert_same(resumed[0], whole[0])
