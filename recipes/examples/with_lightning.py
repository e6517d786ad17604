"""Trains with Lightning's automatic optimisation: FAM is one line of `configure_optimizers`.

python recipes/examples/with_lightning.py
"""

from typing import Any

import lightning
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fam_optim import FAM


def samples(number: int) -> TensorDataset:
    """Returns points in ten dimensions; the class says whether the first two lie in a circle."""
    x = torch.randn(number, 10)
    return TensorDataset(x, (x[:, :2].norm(dim=1) < 1.18).long())


class Classifier(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(10, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU())
        self.head = nn.Linear(64, 2)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.head(self.body(x)), y)

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        x, y = batch
        self.log("test accuracy", (self.head(self.body(x)).argmax(1) == y).float().mean())

    def configure_optimizers(self) -> Any:
        optimizer = FAM.for_model(self, torch.optim.AdamW, lr=3e-3)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)]


lightning.seed_everything(0)
trainer = lightning.Trainer(
    max_epochs=20, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False
)
model = Classifier()
trainer.fit(model, DataLoader(samples(2000), batch_size=64, shuffle=True))
(measured,) = trainer.test(model, DataLoader(samples(2000), batch_size=500), verbose=False)
print(f"test accuracy {measured['test accuracy']:.1%}")
