"""How a run is doing: a bar in a terminal, a line per epoch where the output is a file or a pipe."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from recipes.engine.task import Task, mean
from recipes.engine.training import Progress

BAR = 10  # columns of the bar itself
FIXED = BAR + len(" 100% ") + len("0:00:00 ")  # what stands before the numbers


@contextmanager
def progress_bar(title: str, task: Task, console: Console) -> Iterator[Callable[[Progress], None]]:
    """Yield the callback that shows where the run is; kappa and metrics are those of the last epoch."""
    if not console.is_terminal:
        yield line_per_epoch(title, task, console)
        return
    console.print(title, markup=False, highlight=False)
    columns = (
        BarColumn(bar_width=BAR),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[state]}"),
    )
    with Bar(*columns, console=console) as bar:
        line = bar.add_task(title, total=None, state="")

        def show(progress: Progress) -> None:
            state = fitting(numbers(progress, task), console.width - FIXED)
            bar.update(line, total=progress.steps, completed=progress.step, state=state)

        yield show


def line_per_epoch(title: str, task: Task, console: Console) -> Callable[[Progress], None]:
    """The callback that prints a line whenever an epoch is finished."""
    begin, first, printed = time.monotonic(), None, 0

    def show(progress: Progress) -> None:
        nonlocal first, printed
        first = progress.step if first is None else first
        epoch = progress.record.get("epoch", 0)
        if epoch == printed:
            return
        printed = epoch
        taken = max(1, progress.step - first)
        left = (time.monotonic() - begin) / taken * (progress.steps - progress.step)
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


def fitting(parts: list[str], width: int) -> str:
    """As many of the parts as there is room for; none is cut."""
    text = ""
    for part in parts:
        longer = f"{text}  {part}" if text else part
        if len(longer) > width:
            break
        text = longer
    return text
