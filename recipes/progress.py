"""Progress bars for the recipes: one line per method, with its loss, kappa and validation accuracy."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from recipes.engine import Method, Run


@contextmanager
def progress_bars(
    title: str, methods: Sequence[Method], steps: int, console: Console
) -> Iterator[Callable[[Run], None]]:
    """Yield the callback that shows where a run is; kappa and val are those of the last finished epoch."""
    width = max(len(method.label) for method in methods)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TextColumn("{task.percentage:>3.0f}%"),
        TextColumn("{task.fields[state]}"),
        TimeRemainingColumn(),
    )
    console.print(f"[bold]{title}")
    with Progress(*columns, console=console) as progress:
        tasks = {m.label: progress.add_task(m.label.ljust(width), total=steps, state="") for m in methods}

        def show(run: Run) -> None:
            state = f"loss {run.losses[-1]:6.3f}"
            if run.history:
                state += (
                    f"  kappa {run.history['kappa'][-1]:8.3g}  val {run.history['val_accuracy'][-1]:5.1f}%"
                )
            progress.update(tasks[run.method.label], completed=len(run.step_seconds), state=state)

        yield show
