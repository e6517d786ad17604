"""How a run is doing: a line per epoch, and one a minute where an epoch takes longer."""

import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

from rich.console import Console

from recipes.engine.optimizers import Settings
from recipes.engine.task import Task, mean
from recipes.engine.training import Conditions, Progress, train

PATIENCE = 60.0  # seconds


def train_aloud(
    title: str,
    task: Task,
    settings: Settings,
    conditions: Conditions,
    path: Path,
    console: Console,
    *,
    resume: bool = False,
) -> None:
    """Train into the folder ``path``, saying how it goes."""
    train(task, settings, conditions, path, resume=resume, on_progress=telling(title, task, console))


def telling(title: str, task: Task, console: Console) -> Callable[[Progress], None]:
    """The callback that prints the lines; kappa and metrics are those of the last epoch."""
    begin = said = time.monotonic()
    first, epoch = None, 0

    def show(progress: Progress) -> None:
        nonlocal first, epoch, said
        first = progress.step if first is None else first
        finished, now = progress.record.get("epoch", 0), time.monotonic()
        if finished == epoch and now - said < PATIENCE:
            return
        epoch, said = finished, now
        left = (now - begin) / max(1, progress.step - first) * (progress.steps - progress.step)
        what = [title, f"epoch {epoch}/{progress.epochs}", *numbers(progress, task)]
        what.append(f"{timedelta(seconds=round(left))} left")
        console.print("  ".join(what), markup=False, highlight=False, soft_wrap=True)

    return show


def numbers(progress: Progress, task: Task) -> list[str]:
    """Loss, metrics, kappa and the cost of a step, the most important first."""
    shown = [f"loss {progress.loss:.3f}"]
    names = [name for name in progress.record if name.endswith(f"_{task.metric}")]
    names = [name for name in names if not name.startswith("validation_")] or names
    shown += [f"{name.replace('_', ' ')} {mean(progress.record[name]):.4g}" for name in names]
    if "kappa" in progress.record:
        shown.append(f"kappa {progress.record['kappa']:.3g}")
    return [*shown, f"step {progress.step_time:.2f}x"]
