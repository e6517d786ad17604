"""The proximal step in Lightning, Trainer and Accelerate: the steps of a plain loop on the same batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import accelerate
import lightning
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fam_optim import FAM
from tests.loops.test_trainer import Classifier, Examples, FlatTrainer, arguments
from tests.support import SGD, Net, assert_close, loader

pytestmark = pytest.mark.usefixtures("in_float64_and_tmp_path", "fresh_accelerate")


def proximal(model: nn.Module) -> FAM:
    torch.manual_seed(0)  # of the signs: frameworks have seeds of their own
    return FAM.for_model(model, torch.optim.SGD, every=2, **SGD)


def plain_loop(batches: Any, accumulate: int = 1) -> nn.Module:
    """What every framework must come to."""
    model = Net("batch norm")
    optimizer = proximal(model)
    optimizer.zero_grad()
    for number, (x, y) in enumerate(batches, 1):
        optimizer.regularize(F.cross_entropy(model(x), y) / accumulate).backward()
        if number % accumulate == 0:
            optimizer.step()
            optimizer.zero_grad()
    assert optimizer.regularizer.steps and optimizer.last_kappa is not None
    return model


class Lit(lightning.LightningModule):
    """As anyone writes it; only `configure_optimizers` knows of FAM."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net("batch norm")

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    def configure_optimizers(self) -> Any:
        return proximal(self.net)


class Accumulating(Lit):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.optimizers().regularize(super().training_step(batch, batch_idx))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_lightning(accumulate: int, tmp_path: Path) -> None:
    module = Lit() if accumulate == 1 else Accumulating()
    trainer = lightning.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        accumulate_grad_batches=accumulate,
    )
    trainer.fit(module, loader(8))
    assert_close(module.net, plain_loop(loader(8), accumulate))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_accelerate(accumulate: int) -> None:
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
    fam = proximal(model := Net("batch norm"))
    prepared, optimizer, batches = accelerator.prepare(model, fam, loader(8))
    for x, y in batches:
        with accelerator.accumulate(prepared):
            accelerator.backward(fam.regularize(F.cross_entropy(prepared(x), y)))
            optimizer.step()
            optimizer.zero_grad()
    assert_close(accelerator.unwrap_model(prepared), plain_loop(loader(8), accumulate))


def test_trainer(tmp_path: Path) -> None:
    model = Classifier()
    trainer = FlatTrainer(model, proximal(model.net), args=arguments(tmp_path), train_dataset=Examples(8))
    result = trainer.train()
    seen = [(batch["x"], batch["labels"]) for batch in trainer.seen]
    assert_close(model.net, plain_loop(seen))
    assert result.training_loss > 0
