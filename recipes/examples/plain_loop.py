"""Trains a small network in a plain loop, on 2,000 Fashion-MNIST images with 40 % wrong labels.

python recipes/examples/plain_loop.py              # FAM over SGD
python recipes/examples/plain_loop.py --lam 0      # SGD alone: at lam = 0 FAM's step is the base's
"""

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fam_optim import FAM

parser = argparse.ArgumentParser()
parser.add_argument("--lam", type=float, default=1.0, help="how far kappa pulls, relative to the loss")
parser.add_argument("--epochs", type=int, default=20)
options = parser.parse_args()
torch.manual_seed(0)

images = np.load(Path(__file__).parents[1] / "data" / "fashion_mnist_subset.npz")


def split(name: str, size: int) -> tuple[Tensor, Tensor]:
    pixels = torch.from_numpy(images[f"{name}_images"][:size]).float().flatten(1) / 255
    return (pixels - 0.286) / 0.353, torch.from_numpy(images[f"{name}_labels"][:size]).long()


(x_train, y_train), (x_test, y_test) = split("train", 2000), split("test", 4000)
wrong = torch.rand(len(y_train)) < 0.4
y_train[wrong] = (y_train[wrong] + torch.randint(1, 10, (int(wrong.sum()),))) % 10
loader = DataLoader(TensorDataset(x_train, y_train), batch_size=64, shuffle=True)

model = nn.Sequential(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
optimizer = FAM.for_model(model, torch.optim.SGD, lam=options.lam, lr=0.05, momentum=0.9)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.epochs)

for epoch in range(1, options.epochs + 1):
    for x, y in loader:
        optimizer.zero_grad()
        loss = optimizer.step(lambda: F.cross_entropy(model(x), y))  # FAM calls backward
    schedule.step()
    with torch.no_grad():
        accuracy = (model(x_test).argmax(1) == y_test).float().mean().item()
    print(f"epoch {epoch:2d}: loss {loss.item():.3f}, test accuracy {accuracy:.1%}")
