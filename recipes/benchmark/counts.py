"""The operations behind the benchmark: multiplications of a step, counted, relative to the plain step's.

    python -m recipes.benchmark.counts                                        # table, JSON
    python -m recipes.benchmark.counts --measured runs/benchmark/benchmark.json   # measured times beside them
    python -m recipes.benchmark.counts --smoke

Counted by torch.utils.flop_counter are matrix products and convolutions, forward and backward, of the second
step (the first one verifies what is remembered afterwards). Entrywise operations are not: where they, or the
calls themselves, take the time, the measured ratio is the higher one.
"""

import argparse
import copy
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode

from recipes.benchmark.candidates import CANDIDATES, chosen
from recipes.benchmark.cases import TASKS, Task
from recipes.shared.results import load, record, save

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


def step_flops(task: Task, label: str) -> int | None:
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


def table(rows: Sequence[dict[str, Any]], measured: Sequence[dict[str, Any]]) -> Table:
    """The ratios to the plain step, with the measured ones beside them."""
    times = {row["task"]: row["candidates"] for row in measured}
    result = Table("task", "plain, GFLOP", *COUNTED, box=box.MARKDOWN)
    result.title = "operations relative to the plain step" + (" (measured time)" if times else "")
    for row in rows:
        cells = []
        for label in COUNTED:
            found = times.get(row["task"], {}).get(label, {}).get("ratio")
            beside = f" ({found:.2f})" if found is not None else ""
            cells.append(quotient(row["candidates"].get(label), row["plain"]) + beside)
        result.add_row(row["task"], f"{row['plain'] / 1e9:.3g}", *cells)
    return result


def quotient(over: int | None, under: int) -> str:
    """For the table; "-" where there is none."""
    return "-" if over is None else f"{over / under:.2f}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Count, print, save."""
    parser = argparse.ArgumentParser(
        prog="python -m recipes.benchmark.counts", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), metavar="TASK")
    parser.add_argument("--measured", type=Path, help="JSON of recipes.benchmark")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark_counts"))
    parser.add_argument("--smoke", action="store_true", help="the smallest tasks: a test, no result")
    options = parser.parse_args(arguments)
    if options.smoke:
        options.tasks = ["tiny 16x16", "efficientnet head 100x256"]
    torch.set_num_threads(options.threads)
    console = Console(width=240)
    begin = time.perf_counter()
    rows = []
    for name in options.tasks:
        with console.status(name):
            rows.append(count(name))
    path = options.out / "benchmark_counts.json"
    configuration = {"operations": "two per multiplication", "smoke": options.smoke}
    save(path, record("benchmark_counts", configuration, time.perf_counter() - begin, rows))
    console.print(table(rows, load(options.measured)["runs"] if options.measured else []))


if __name__ == "__main__":
    main()
