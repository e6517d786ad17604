"""Trains a task, keeps what is measured in the run's folder, and continues a run that was stopped."""

from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from fam_optim import dataset_relative_flatness
from recipes.engine.batches import first, ordered
from recipes.engine.layers import select
from recipes.engine.loop import Conditions, Loop
from recipes.engine.optimizers import GAUSS_NEWTON, MEASURING, Settings, build
from recipes.engine.progress import Progress
from recipes.engine.run_folder import RunFolder
from recipes.engine.step_time import relative_step_time
from recipes.engine.task import Batch, Evaluation, Task
from recipes.shared.results import environment

TIMED_BATCHES = 10  # on which the relative step time is measured
WATCHED = 20  # how often in a run a task's quick evaluation is made


def train(
    task: Task,
    settings: Settings,
    conditions: Conditions,
    path: Path,
    *,
    title: str = "",
    console: Console | None = None,
    resume: bool = False,
) -> None:
    """Trains into the folder ``path``; after each epoch it holds everything measured, and a checkpoint.

    The console shows the progress. A folder that holds a run is continued only with ``resume``. Settings that
    cannot work raise before a folder is made.
    """
    folder = RunFolder(path)
    asked = configuration(task, settings, conditions)
    folder.check(asked, resume)
    loop = Loop(task, conditions, lambda model: build(settings, model, select(model, task.layers)))
    state, records = folder.load(conditions.device), folder.epochs()
    if state is None:  # the folder is made after all that a wrong setting could stop
        folder.begin(asked, environment(conditions.device), rehearse(loop, settings))
    else:
        loop.load(state)
    records = records[: state["epoch"]] if state else []
    step_time = folder.read("step_time.json")["median"]
    progress = Progress(title, loop, len(records), step_time, console or Console(quiet=True))
    for epoch, loss in loop.epochs(len(records), progress.after_step):
        records.append({"epoch": epoch, "train_loss": loss, **measured(loop, epoch)})
        folder.save(records, {"epoch": epoch, **loop.state()})
        if conditions.keep and epoch % conditions.keep == 0:
            torch.save(loop.model.state_dict(), path / f"epoch{epoch}.pt")
        progress.after_epoch(records[-1])


def rehearse(loop: Loop, settings: Settings) -> dict[str, Any]:
    """Measures kappa of a batch, then the relative time of the step; raises ValueError if either fails."""
    timed = list(islice(loop.batches(0), TIMED_BATCHES))
    try:
        kappa(loop.task, loop.model, timed[:1])
        return relative_step_time(loop, settings, timed)
    except (RuntimeError, TypeError) as error:  # the library's errors say what to do instead
        raise ValueError(str(error)) from error


def configuration(task: Task, settings: Settings, conditions: Conditions) -> dict[str, Any]:
    """Returns what identifies a run: only a command with the same configuration can continue it."""
    what = {
        "task": task.name,
        "layers": list(task.layers),
        "kappa": kappa_options(task),
        "settings": settings,
    }
    how = {name: getattr(conditions, name) for name in ("seed", "epochs", "batch_size")}
    return {**what, **how, "smoke": conditions.source.smoke, "device": conditions.device.type}


def measured(loop: Loop, epoch: int) -> dict[str, Any]:
    """Returns what the task measures after this epoch: metrics by the evaluation sets' names, and kappa."""
    task, epochs = loop.task, loop.conditions.epochs

    def due(parts: Iterable[float]) -> bool:
        return epoch in (round(part * epochs) for part in parts)

    def on_every_set(evaluation: Evaluation) -> dict[str, Any]:
        found = {name: loop.evaluate(evaluation, samples) for name, samples in loop.data.evaluation.items()}
        return {f"{name}_{metric}": value for name, own in found.items() for metric, value in own.items()}

    record: dict[str, Any] = {}
    watched = task.watch is None or due(n / WATCHED for n in range(1, WATCHED + 1))
    if task.watch and watched:
        record |= on_every_set(task.watch)
    if not task.evaluated_at or due(task.evaluated_at):
        record |= on_every_set(task.evaluate)
    if watched:
        samples = first(loop.data.train, task.kappa_samples)
        batches = ordered(samples, loop.conditions.batch_size, loop.conditions.workers)
        record["kappa"] = kappa(task, loop.model, batches)
    return record


def kappa_options(task: Task) -> dict[str, Any]:
    """Returns measure, mode, curvature and number of probes of kappa, if the task sets them."""
    fam = task.methods.get("fam", {})
    own = {name: value for name, value in fam.items() if name in MEASURING}
    return GAUSS_NEWTON if fam.get("mode") == "proximal" else own


def kappa(task: Task, model: nn.Module, batches: Iterable[Batch]) -> float:
    """Returns kappa as the task has it for FAM, whatever the optimizer is: the sum over the layers."""
    layers = select(model, task.layers)
    return dataset_relative_flatness(model, layers, task.loss, batches, **kappa_options(task)).sum().item()
