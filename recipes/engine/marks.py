"""Who says so: for each of a task's settings, whether it is the paper's, the released code's, or ours.

A task names the settings that the paper states and those that the released code decides; all others are ours.
Settings that are not numbers (the network, what is done to its input) stand in the task's ``facts``.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from rich.table import Table

from recipes.engine.optimizers import WRAPPERS, settings
from recipes.engine.task import Task
from recipes.shared.tables import table as make_table

PAPER, CODE, OURS = "paper", "released code", "ours"
CAPTION = "Settings, with P for the paper's, C for the released code's, O for ours"
SHORT = {PAPER: "P", CODE: "C", OURS: "O"}
NAMED = ("optimizer", "base", "nesterov")  # what the name of the optimizer says already


def settings_of(task: Task) -> dict[str, str]:
    """Every setting of a task by name, as text."""
    base = settings(task, task.base, {})
    values: dict[str, Any] = {
        **task.facts,
        "epochs": task.epochs,
        "batch size": task.batch_size,
        "optimizer": task.base,
        **{name: value for name, value in base.items() if name not in NAMED},
        "schedule": getattr(task.schedule, "__name__", task.schedule),
        "layer": ", ".join(task.layers),
    }
    for wrapper in ("fam", "sam"):
        own = {**WRAPPERS[wrapper], **task.methods.get(wrapper, {})}
        values |= {f"{wrapper} {name}": value for name, value in own.items()}
    return {name: str(value) for name, value in values.items()}


def mark(task: Task, name: str) -> str:
    """Who states a setting."""
    return PAPER if name in task.paper else CODE if name in task.code else OURS


def lines(task: Task, without: Iterable[str] = ()) -> list[str]:
    """One line per mark, such as "paper: epochs 250, batch size 64"."""
    values = {name: value for name, value in settings_of(task).items() if name not in set(without)}
    marked = {who: [name for name in values if mark(task, name) == who] for who in (PAPER, CODE, OURS)}
    return [
        f"{who}: {', '.join(f'{name} {values[name]}' for name in names)}"
        for who, names in marked.items()
        if names
    ]


def table(tasks: Sequence[Task]) -> Table:
    """A row per setting, a column per task; each value with its mark's letter, valid Markdown."""
    columns = [settings_of(task) for task in tasks]
    result = make_table("setting", *(task.name for task in tasks), title=CAPTION)
    for name in dict.fromkeys(name for column in columns for name in column):
        cells = [
            f"{column[name]} ({SHORT[mark(task, name)]})" if name in column else "-"
            for task, column in zip(tasks, columns, strict=True)
        ]
        result.add_row(name, *cells)
    return result
