"""The engine: trains any task with any optimizer into a run's folder, and continues where it was stopped.

Everything random in an epoch (order, augmentation, dropout, probes) comes from generators that are seeded
anew at its beginning, from the run's seed and the epoch's number. So two optimizers with the same seed see
the same batches, and a run that is continued needs no generator's state to be the same bit for bit.
"""

import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from fam_optim import dataset_relative_flatness
from recipes.engine.batches import first, move, of_epoch, ordered
from recipes.engine.layers import select
from recipes.engine.optimizers import GAUSS_NEWTON, MEASURING, Settings, build, take_step
from recipes.engine.run_folder import RunFolder
from recipes.engine.step_time import relative_step_time
from recipes.engine.task import Batch, Data, Evaluation, Source, Task
from recipes.shared.results import environment

TIMED_BATCHES = 10  # behind the relative step time
WATCHED = 20  # how often a run is watched, where its task has something quick to watch
SHOWN_EVERY = 10  # steps between two updates of the progress bar: reading the loss waits for the device


@dataclass(frozen=True)
class Conditions:
    """What a run is made under, besides its task and its optimizer."""

    seed: int
    epochs: int
    batch_size: int
    source: Source
    device: torch.device
    workers: int = 0  # processes that load the samples
    keep: int | None = None  # the network after every so many epochs, beside the last checkpoint


@dataclass(frozen=True)
class Progress:
    """Where a run is, for a progress bar."""

    step: int  # of how many are taken
    steps: int  # in all
    epochs: int
    loss: float  # of the last batch
    record: Mapping[str, Any]  # of the last finished epoch
    step_time: float  # relative to the plain step


def train(
    task: Task,
    settings: Settings,
    conditions: Conditions,
    path: Path,
    *,
    resume: bool = False,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> None:
    """Train into the folder ``path``; after each epoch it holds everything measured, and a checkpoint.

    Raises:
        Missing: if the task's data are not there.
        FileExistsError: if the folder holds a run and ``resume`` is False.
        ValueError: if the folder's run was begun with another configuration, or what is asked for is
            not possible: then there is no folder.
    """
    folder, device = RunFolder(path), conditions.device
    asked = configuration(task, settings, conditions)
    folder.check(asked, resume)
    data = task.data(conditions.source, conditions.seed)
    count = len(data.train)  # type: ignore[arg-type]
    if conditions.batch_size > count and not conditions.source.smoke:
        raise ValueError(
            f"expected a batch size of at most the {count} training samples, got {conditions.batch_size}: "
            "give a smaller --batch-size"
        )
    seed_everything(conditions.seed)  # of the initial weights, whatever the data have drawn
    model = task.model(conditions.source).to(device)
    optimizer = build(settings, model, select(model, task.layers))
    state = folder.load(device)
    if state is None:  # the folder comes after what a wrong setting could stop
        folder.begin(asked, environment(device), rehearse(task, settings, model, data, conditions))
    step_time = folder.read("step_time.json")["median"]

    per_epoch = len(epoch_batches(data, conditions, 0))
    steps = conditions.epochs * per_epoch
    schedule = LambdaLR(optimizer, lambda step: task.schedule(step / steps))
    records: list[dict[str, Any]] = []
    if state is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        records = folder.epochs()[: state["epoch"]]

    def show(step: int, loss: Tensor) -> None:
        record = records[-1] if records else {}
        on_progress(Progress(step, steps, conditions.epochs, loss.item(), record, step_time))

    for epoch in range(len(records) + 1, conditions.epochs + 1):
        seed_everything(conditions.seed, epoch)
        model.train()
        losses: list[Tensor] = []
        for inputs, targets in moved(epoch_batches(data, conditions, epoch), device):
            losses.append(take_step(optimizer, model, task.loss, inputs, targets))
            schedule.step()
            if len(losses) == 1 or len(losses) % SHOWN_EVERY == 0:
                show((epoch - 1) * per_epoch + len(losses), losses[-1])
        record: dict[str, Any] = {"epoch": epoch, "train_loss": torch.stack(losses).mean().item()}
        watched = task.watch is None or due(epoch, conditions, [n / WATCHED for n in range(1, WATCHED + 1)])
        if task.watch and watched:
            record |= evaluate(task.watch, model, data, conditions)
        if not task.evaluated_at or due(epoch, conditions, task.evaluated_at):
            record |= evaluate(task.evaluate, model, data, conditions)
        if watched:
            record["kappa"] = kappa(task, model, measured_on(task, data, conditions))
        records.append(record)
        folder.save(
            records,
            {
                "epoch": epoch,
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "schedule": schedule.state_dict(),
            },
        )
        if conditions.keep and epoch % conditions.keep == 0:
            torch.save(model.state_dict(), path / f"epoch{epoch}.pt")
        show(epoch * per_epoch, losses[-1])


def rehearse(
    task: Task, settings: Settings, model: nn.Module, data: Data, conditions: Conditions
) -> dict[str, Any]:
    """Take some steps on copies of the model, and measure kappa of a batch, before a folder is begun.

    Returns the relative time of the step.

    Raises:
        ValueError: if the layers, the loss and what is asked of kappa do not go together.
    """
    batches = moved(epoch_batches(data, conditions, 0), conditions.device)
    timed = list(islice(batches, TIMED_BATCHES))
    try:
        kappa(task, model, timed[:1])
        return relative_step_time(task, settings, model, timed, conditions.device)
    except (RuntimeError, TypeError) as error:  # the library's, which say what to do instead
        raise ValueError(str(error)) from error


def configuration(task: Task, settings: Settings, conditions: Conditions) -> dict[str, Any]:
    """What identifies a run: continuing it asks for the same."""
    return {
        "task": task.name,
        "layers": list(task.layers),
        "kappa": kappa_options(task),
        "settings": settings,
        "seed": conditions.seed,
        "epochs": conditions.epochs,
        "batch_size": conditions.batch_size,
        "smoke": conditions.source.smoke,
        "device": conditions.device.type,
    }


def seed_everything(*seeds: int) -> None:
    """Seed Python's, NumPy's and torch's generators from one or several numbers."""
    seed = int(np.random.SeedSequence(seeds).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def epoch_batches(data: Data, conditions: Conditions, epoch: int) -> DataLoader[Batch]:
    """The training samples in the order of an epoch."""
    return of_epoch(data.train, conditions.batch_size, conditions.seed, epoch, conditions.workers)


def moved(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """The batches on the device."""
    return (move(batch, device) for batch in batches)


def due(epoch: int, conditions: Conditions, parts: Iterable[float]) -> bool:
    """Whether one of these parts of the training ends with this epoch."""
    return epoch in (round(part * conditions.epochs) for part in parts)


def evaluate(evaluation: Evaluation, model: nn.Module, data: Data, conditions: Conditions) -> dict[str, Any]:
    """The metrics on each of the evaluation sets, in eval mode: {"test_accuracy": ..., ...}."""
    model.eval()
    metrics: dict[str, Any] = {}
    for name, samples in data.evaluation.items():
        batches = moved(ordered(samples, conditions.batch_size, conditions.workers), conditions.device)
        metrics |= {f"{name}_{metric}": value for metric, value in evaluation(model, batches).items()}
    return metrics


def measured_on(task: Task, data: Data, conditions: Conditions) -> DataLoader[Batch]:
    """The first training samples, on which kappa is measured after an epoch."""
    return ordered(first(data.train, task.kappa_samples), conditions.batch_size, conditions.workers)


def kappa_options(task: Task) -> dict[str, Any]:
    """Measure, mode, curvature and number of probes, where the task has its own."""
    fam = task.methods.get("fam", {})
    if fam.get("mode") == "proximal":
        return GAUSS_NEWTON
    return {name: value for name, value in fam.items() if name in MEASURING}


def kappa(task: Task, model: nn.Module, batches: Iterable[Batch]) -> float:
    """kappa of the loss, as the task has it for FAM, for every optimizer: the sum over the layers.

    The batches are read once for each layer.
    """
    values = [
        dataset_relative_flatness(model, layer, task.loss, batches, **kappa_options(task))
        for layer in select(model, task.layers)
    ]
    return torch.stack(values).sum().item()
