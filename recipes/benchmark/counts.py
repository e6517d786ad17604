"""The operations behind the benchmark: multiplications of a step, counted, relative to the plain step's.

    python -m recipes.benchmark.counts                                            # table, JSON
    python -m recipes.benchmark.counts --measured runs/benchmark/benchmark.json   # measured times beside them
    python -m recipes.benchmark.counts --smoke

Counted by torch.utils.flop_counter are matrix products and convolutions, forward and backward, of the second
step (the first one verifies what is remembered afterwards). Entrywise operations are not: where they, or the
calls themselves, take the time, the measured ratio is the higher one.
"""

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode

from recipes.benchmark.candidates import CANDIDATES, chosen
from recipes.benchmark.cases import TASKS
from recipes.shared.command import Options, Recipe
from recipes.shared.problem import Problem
from recipes.shared.results import load
from recipes.shared.tables import table as make_table

COUNTED = (
    *("FAM exact", "FAM exact, detached", "FAM hutchinson", "FAM hutchinson, detached"),
    *("FAM Gauss-Newton", "FAM Gauss-Newton, detached", "SAM"),
)


def counter() -> FlopCounterMode:
    """Counts, also the products that torch's table leaves out."""

    def addmm_(total: Sequence[int], a: Sequence[int], b: Sequence[int], **rest: Any) -> int:
        return 2 * a[0] * a[1] * b[1]

    return FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: addmm_})


def flops(call: Callable[[], Any]) -> int:
    """Operations of matrix products and convolutions in a call: two per multiplication."""
    with counter() as counted:
        call()
    total: int = counted.get_total_flops()
    return total


def step_flops(task: Problem, label: str) -> int | None:
    """Of a candidate's second step; None where it is refused."""
    step = CANDIDATES[label].build(copy.deepcopy(task))
    try:
        step()
        return flops(step)
    except RuntimeError:
        return None


def count(name: str) -> dict[str, Any]:
    """One row: every candidate's operations."""
    torch.manual_seed(0)
    task = TASKS[name]()
    return {
        "task": name,
        "plain": step_flops(task, "plain"),
        "candidates": {label: step_flops(task, label) for label in chosen(COUNTED, name) if label != "plain"},
    }


def measure(options: Options) -> list[dict[str, Any]]:
    """One row per task, with the measured time's ratios where they were given."""
    rows = [count(name) for name in options.tasks]
    return beside(rows, load(options.measured)["runs"] if options.measured else [])


def beside(rows: Sequence[dict[str, Any]], measured: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with what recipes.benchmark has measured of the same tasks."""
    times = {row["task"]: row["candidates"] for row in measured}
    ratios = [{label: found.get("ratio") for label, found in times.get(r["task"], {}).items()} for r in rows]
    return [{**row, "measured": found} for row, found in zip(rows, ratios, strict=True)]


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """The ratios to the plain step, with the measured ones."""
    title = "Operations relative to the plain step's (in brackets: measured time)"
    labels = [label for label in COUNTED if any(label in row["candidates"] for row in rows)]
    result = make_table("task", "plain, GFLOP", *labels, title=title)
    for row in rows:
        cells = []
        for label in labels:
            over, time = row["candidates"].get(label), row.get("measured", {}).get(label)
            beside = f" ({time:.2f})" if time is not None else ""
            cells.append("-" if over is None else f"{over / row['plain']:.2f}{beside}")
        result.add_row(row["task"], f"{row['plain'] / 1e9:.3g}", *cells)
    return result


OPTIONS: dict[str, dict[str, Any]] = {
    "--tasks": {"nargs": "+", "choices": TASKS, "default": list(TASKS), "metavar": "TASK"},
    "--measured": {"type": Path, "metavar": "JSON", "help": "of recipes.benchmark: times beside the counts"},
}
SMOKE = {"tasks": ["tiny 16x16", "efficientnet head 100x256"]}
RECIPE = Recipe("benchmark.counts", __doc__, measure, table, None, OPTIONS, SMOKE)
main = RECIPE.main

if __name__ == "__main__":
    main()
