"""Trains with DistributedDataParallel: two processes on the CPU train as one would on the whole batch.

The loop does not mention the other process: in every tenth step FAM averages what it has seen over both.

    torchrun --nproc-per-node 2 recipes/examples/two_processes.py

On GPUs: `init_process_group("nccl")`, and model and batches on `cuda:{LOCAL_RANK}`.
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from fam_optim import FAM

dist.init_process_group("gloo")
torch.manual_seed(0)  # the same data and initial weights in every process

x = torch.randn(4000, 10)
y = (x[:, :2].norm(dim=1) < 1.18).long()  # inside or outside of a circle
train, test = TensorDataset(x[:2000], y[:2000]), (x[2000:], y[2000:])
sampler: DistributedSampler[Any] = DistributedSampler(train)  # every process sees its own share
loader = DataLoader(train, batch_size=32, sampler=sampler)

model = nn.Sequential(nn.Linear(10, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))
parallel = DistributedDataParallel(model)
optimizer = FAM.for_model(model, torch.optim.AdamW, lr=3e-3)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)

for epoch in range(20):
    sampler.set_epoch(epoch)
    for inputs, targets in loader:
        optimizer.zero_grad()
        loss = optimizer.step(lambda: F.cross_entropy(parallel(inputs), targets))
    schedule.step()

with torch.no_grad():
    accuracy = (model(test[0]).argmax(1) == test[1]).float().mean().item()
weights = torch.cat([p.detach().flatten() for p in model.parameters()])
everyones = [torch.empty_like(weights) for _ in range(dist.get_world_size())]
dist.all_gather(everyones, weights)
if dist.get_rank() == 0:
    same = all(torch.equal(weights, others) for others in everyones)
    print(f"{len(everyones)} processes, the same weights in all: {same}")
    print(f"test accuracy {accuracy:.1%}")
dist.destroy_process_group()
