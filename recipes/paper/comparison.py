"""Compares the paper's numbers, which stand in ``numbers.json``, with those of our runs.

The paper does not state what follows a ± in Table 1 (standard deviation or error), its seeds, or HD's unit.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

from recipes.engine.pictures import at, title
from recipes.shared.results import grouped
from recipes.shared.tables import summary
from recipes.shared.tables import table as make_table

Run = dict[str, Any]
NOT_RUN, OTHER = "not run", "other than in the paper"
IN_STAND_INS = ("epochs", "measure", "detach_hessian", "curvature")  # what is compared for a small form
PRINTED = json.loads((Path(__file__).parent / "numbers.json").read_text())


@dataclass(frozen=True)
class Row:
    """A line of one of the paper's tables."""

    experiment: str  # the task of the recipes that has its settings
    where: str
    scale: float  # from the unit of the records to the paper's
    stated: Mapping[str, Any]  # what the paper says of a run's configuration and settings
    name: str
    optimizers: tuple[str, ...]  # the recipes' names of this line
    numbers: Mapping[str, str]  # as printed, by the quantity's name in a run's records
    settings: Mapping[str, Any] = field(default_factory=dict)  # of the optimizer on this line
    part: float = 1  # of the training, after which the line was measured


ROWS = [
    Row(experiment, own["where"], own["scale"], own["stated"], **line)
    for experiment, own in PRINTED["experiments"].items()
    for line in own["lines"]
]
# a task that is a small form of one of the paper's experiments -> that experiment, what else differs
STAND_INS = {task: tuple(form.values()) for task, form in PRINTED["small_forms"].items()}
# appendix A.1: a method -> a slower one, how many times faster it is than that (NVIDIA RTX A6000)
FIGURE_4: dict[str, tuple[str, str]] = PRINTED["figure_4"]


def compare(task: str, runs: Sequence[Run]) -> Table | None:
    """Makes the table of one of the paper's experiments or of its small form; None for another task."""
    experiment, other = STAND_INS.get(task, (task, ""))
    rows = [row for row in ROWS if row.experiment == experiment]
    if not rows:
        return None
    quantities = list(rows[0].numbers)
    headings = [title(name).replace("%", "fraction" if rows[0].scale == 0.01 else "%") for name in quantities]
    caption = f"{task}: {rows[0].where} of the paper / here"
    result = make_table("line", "run", "after", *headings, OTHER, title=caption)
    for row in rows:
        for label, group in matching(row, runs) or [(NOT_RUN, [])]:
            cells = [f"{row.numbers[name]} / {measured(row, name, group)}" for name in quantities]
            after = "half" if row.part == 0.5 else "the end"
            result.add_row(row.name, label, after, *cells, differences(row, group, other))
    return result


def matching(row: Row, runs: Sequence[Run]) -> list[tuple[str, list[Run]]]:
    """Returns the runs that match a line of the paper, by label; those of a label differ only in seed."""

    def belongs(chosen: Mapping[str, Any]) -> bool:
        plain = chosen["optimizer"] == "fam" and chosen.get("lam") == 0  # bit for bit the base's step
        optimizer = chosen["base"] if plain else chosen["optimizer"]
        return optimizer in row.optimizers and all(chosen.get(k) == v for k, v in row.settings.items())

    return list(grouped((run for run in runs if belongs(run["settings"])), lambda run: run["label"]).items())


def measured(row: Row, name: str, runs: Sequence[Run]) -> str:
    """Returns what the runs measured at the line's part of the training, in the paper's unit."""
    if not runs:
        return NOT_RUN
    return summary(name, [row.scale * at(run, name, round(row.part * run["epochs"]) - 1) for run in runs])


def differences(row: Row, runs: Sequence[Run], other: str) -> str:
    """Returns in what the runs' settings differ from the paper's, such as "epochs 60, not 200"."""
    if not runs:
        return "-"
    chosen = runs[0]["settings"]
    stated = {**row.stated, "detach_hessian": False, "curvature": "hessian"}
    if [*row.optimizers] == ["sam"]:
        stated.pop("lr", None)  # SAM has its own learning rate
    found = {**runs[0], **(chosen if "fam" in row.optimizers else {"lr": chosen["lr"]})}
    compared = [name for name in stated if name in found and (name in IN_STAND_INS or not other)]
    said = [other] if other else []
    for name in (name for name in compared if found[name] != stated[name]):
        ours, theirs = (", ".join(v) if isinstance(v, list) else v for v in (found[name], stated[name]))
        unlike = f"{name.replace('_', ' ')} {ours}, not {theirs}"
        said.append("Hessian detached" if name == "detach_hessian" else unlike)
    return "; ".join([*said, f"{len(runs)} seed{'s' if len(runs) > 1 else ''}"])


def figure_4(runs: Sequence[Run]) -> Table:
    """Makes a table of how many times faster each way to a Hessian is than a slower one: paper, and here."""
    names = ("faster", "than", "paper (RTX A6000)", "here, range over the sizes", "here, largest Hessian")
    result = make_table(*names, title="Figure 4, appendix A.1: how many times faster")
    seconds = {(run["method"], run["family"], run["d"], run["m"]): run["seconds"] for run in runs}
    for method, (slower, stated) in FIGURE_4.items():
        sizes = [size for name, *size in seconds if name == method and (slower, *size) in seconds]
        factors = [seconds[(slower, *size)] / seconds[(method, *size)] for size in sizes]
        largest = max(zip(sizes, factors, strict=True), key=lambda pair: pair[0][1] * pair[0][2])
        (_, d, m), factor = largest
        span = f"{min(factors):.2g} to {max(factors):.2g}"
        result.add_row(method, slower, stated, span, f"{factor:.2g} ({d} x {m} weights)")
    return result
