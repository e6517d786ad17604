"""Logs loss and kappa to TensorBoard while a small network trains, and draws kappa at the end.

    python recipes/examples/log_kappa.py                 # writes runs/log_kappa
    tensorboard --logdir runs/log_kappa

kappa of a batch is a by-product of every tenth step. It stays on the device until it is read.
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import nn

from fam_optim import FAM

try:
    from torch.utils.tensorboard import SummaryWriter
except ImportError:
    raise SystemExit('TensorBoard is not installed: pip install -e ".[examples]"') from None

parser = argparse.ArgumentParser()
parser.add_argument("--out", type=Path, default=Path("runs/log_kappa"))
folder = parser.parse_args().out
torch.manual_seed(0)
plt.switch_backend("agg")

x = torch.randn(2000, 10)
y = (x[:, :2].norm(dim=1) < 1.18).long()  # inside or outside of a circle
model = nn.Sequential(nn.Linear(10, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))
optimizer = FAM.for_model(model, torch.optim.AdamW, lr=3e-3)

kappas = {}
with SummaryWriter(str(folder)) as writer:
    for step in range(600):
        rows = torch.randint(len(x), (64,))
        optimizer.zero_grad()
        loss = optimizer.step(lambda: F.cross_entropy(model(x[rows]), y[rows]))
        if step % 10 == 9 and optimizer.last_kappa is not None:  # the step that measured it
            kappas[step] = optimizer.last_kappa.item()
            writer.add_scalar("loss", loss.item(), step)
            writer.add_scalar("kappa", kappas[step], step)

figure, axes = plt.subplots(figsize=(5, 3), layout="constrained")
axes.plot(list(kappas), list(kappas.values()))
axes.set(xlabel="step", ylabel="kappa of the batch", yscale="log")
figure.savefig(folder / "kappa.png", dpi=150)
print(f"kappa {kappas[max(kappas)]:.3f}; the picture is {folder / 'kappa.png'}")
