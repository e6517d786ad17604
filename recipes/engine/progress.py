"""A progress bar for a run: loss, kappa, the leading metric, and the step's time relative to a plain step."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from recipes.engine.task import Task, mean
from recipes.engine.training import Progress


@contextmanager
def progress_bar(title: str, task: Task, console: Console) -> Iterator[Callable[[Progress], None]]:
    """Yield the callback that shows where the run is; kappa and metrics are those of the last epoch."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TextColumn("{task.percentage:>3.0f}%"),
        TextColumn("{task.fields[state]}"),
        TimeRemainingColumn(),
    )
    with Bar(*columns, console=console) as bar:
        line = bar.add_task(title, total=None, state="")

        def show(progress: Progress) -> None:
            state = [f"loss {progress.loss:.3f}"]
            if "kappa" in progress.record:
                state.append(f"kappa {progress.record['kappa']:.3g}")
            metrics = [name for name in progress.record if name.endswith(f"_{task.metric}")]
            state += [f"{name} {mean(progress.record[name]):.4g}" for name in metrics]
            state.append(f"step {progress.step_time:.2f}x")
            bar.update(line, total=progress.steps, completed=progress.step, state="  ".join(state))

        yield show
