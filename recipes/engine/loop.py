"""Trains the network of any task with any optimizer, epoch by epoch.

At the beginning of an epoch, all random generators (order, augmentation, dropout, probes) are seeded from the
run's seed and the epoch's number. So two optimizers with the same seed see the same batches, and a continued
run is the same bit for bit, although no generator's state is saved.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from recipes.engine.batches import each_tensor, of_epoch, ordered
from recipes.engine.optimizers import take_step
from recipes.engine.task import Batch, Evaluation, Metrics, Samples, Source, Task
from recipes.shared.results import CPU


@dataclass(frozen=True)
class Conditions:
    """The conditions of a run, besides its task and its optimizer."""

    seed: int
    epochs: int
    batch_size: int
    source: Source = Source()  # noqa: RUF009  (it is frozen)
    device: torch.device = CPU
    workers: int = 0  # processes that load the samples
    keep: int | None = None  # save the network every so many epochs, beside the last checkpoint


def seed_everything(*seeds: int) -> None:
    """Seeds Python's, NumPy's and torch's generators from one or several numbers."""
    seed = int(np.random.SeedSequence(seeds).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


class Loop:
    """A network with its optimizer, its learning rate's schedule and its samples."""

    def __init__(
        self, task: Task, conditions: Conditions, make: Callable[[nn.Module], torch.optim.Optimizer]
    ) -> None:
        """``make`` is called with the network, and returns its optimizer."""
        self.task, self.conditions = task, conditions
        self.data = task.data(conditions.source, conditions.seed)
        count = len(self.data.train)  # type: ignore[arg-type]
        if conditions.batch_size > count and not conditions.source.smoke:
            got = f"{conditions.batch_size}: give a smaller --batch-size"
            raise ValueError(f"expected a batch size of at most the {count} training samples, got {got}")
        seed_everything(conditions.seed)  # fixes the initial weights, whatever the data have drawn
        self.model = task.model(conditions.source).to(conditions.device)
        self.optimizer = make(self.model)
        self.per_epoch = len(self._loader(0))
        self.steps = conditions.epochs * self.per_epoch
        self.schedule = LambdaLR(self.optimizer, lambda step: task.schedule(step / self.steps))

    def epochs(
        self, finished: int = 0, after_step: Callable[[int, Tensor], None] = lambda step, loss: None
    ) -> Iterator[tuple[int, float]]:
        """Trains; yields each epoch's number and mean loss. ``after_step`` gets each step and its loss."""
        for epoch in range(finished + 1, self.conditions.epochs + 1):
            seed_everything(self.conditions.seed, epoch)
            self.model.train()
            losses: list[Tensor] = []
            for inputs, targets in self.batches(epoch):
                losses.append(self.step(inputs, targets))
                self.schedule.step()
                after_step((epoch - 1) * self.per_epoch + len(losses), losses[-1])
            yield epoch, torch.stack(losses).mean().item()

    def step(self, inputs: Any, targets: Any) -> Tensor:
        """Takes one step on a batch, and returns its loss without a penalty."""
        return take_step(self.optimizer, self.model, self.task.loss, inputs, targets)

    def batches(self, epoch: int) -> Iterator[Batch]:
        """Returns the training batches of an epoch, on the device."""
        return self._moved(self._loader(epoch))

    def evaluate(self, evaluation: Evaluation, samples: Samples, batch_size: int | None = None) -> Metrics:
        """Returns the metrics on these samples, with the network in eval mode."""
        self.model.eval()
        size = batch_size or self.conditions.batch_size
        return evaluation(self.model, self._moved(ordered(samples, size, self.conditions.workers)))

    def state(self) -> dict[str, Any]:
        """Returns all states that a run needs to go on."""
        parts = {"model": self.model, "optimizer": self.optimizer, "schedule": self.schedule}
        return {name: part.state_dict() for name, part in parts.items()}  # type: ignore[attr-defined]

    def load(self, state: dict[str, Any]) -> None:
        """Goes on from a state that ``state`` returned."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])

    def _loader(self, epoch: int) -> DataLoader[Batch]:
        own = self.conditions
        return of_epoch(self.data.train, own.batch_size, own.seed, epoch, own.workers)

    def _moved(self, batches: DataLoader[Batch]) -> Iterator[Batch]:
        device = self.conditions.device
        return (each_tensor(lambda t: t.to(device, non_blocking=True), batch) for batch in batches)
