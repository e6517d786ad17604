"""What a step costs, relative to the same step of the plain base optimizer.

    python -m recipes.benchmark                                 # every row
    python -m recipes.benchmark --tasks "resnet18 hidden"       # one row; others in the results stay
    python -m recipes.benchmark --smoke                         # seconds: does everything run?
    python -m recipes.benchmark --accelerator                   # a GPU's rows, in ten minutes

The candidates of a row take turns in one process, in an order that rotates; every block of steps is compared
with the plain one of the same round, so that a busy machine slows both. Before anything is timed, the exact
kappa is compared with the mean of its random estimates.
"""

import copy
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from recipes.benchmark import accelerator
from recipes.benchmark.candidates import CANDIDATES, chosen
from recipes.benchmark.cases import CASES, HIDDEN
from recipes.benchmark.check import check
from recipes.benchmark.measuring import prepared, timings
from recipes.benchmark.tables import tables
from recipes.shared.command import Distinct, Options, add_device, add_smoke, out, parser, positive
from recipes.shared.results import environment, load, save
from recipes.shared.tables import console, markdown, show


def measure(name: str, options: Options) -> dict[str, Any]:
    """One row: check, then all candidates in alternation."""
    torch.manual_seed(0)
    problem = CASES[name].build().copy(device=options.device)
    candidates = chosen(options.candidates, name)
    checked = check(copy.deepcopy(problem), candidates.values(), options.probes)
    steps, results = prepared(problem, candidates, options.device)
    timed = timings(steps, candidates, options.seconds, options.device)
    return {
        "task": name,
        "check": checked,
        "candidates": {label: {**own, **timed.get(label, {})} for label, own in results.items()},
    }


def parse(arguments: Sequence[str] | None) -> Options:
    """Read the command line."""
    listed = {
        f"row {name}": f"{case.about}{'; all layers but the last' * (name in HIDDEN)}"
        for name, case in CASES.items()
    }
    listed |= {f"column {label}": candidate.about for label, candidate in CANDIDATES.items()}
    reader = parser("benchmark", __doc__, listed)
    for option, names, metavar in (("--tasks", CASES, "ROW"), ("--candidates", CANDIDATES, "COLUMN")):
        reader.add_argument(
            option, nargs="+", action=Distinct, choices=names, default=list(names), metavar=metavar
        )
    reader.add_argument("--seconds", type=positive, default=60, help="of the rounds of a row, about")
    reader.add_argument("--probes", type=positive, default=32, help="of the check")
    reader.add_argument("--threads", type=positive, default=2)
    add_device(reader)
    reader.add_argument("--out", type=Path, default=Path("runs/benchmark"))
    reader.add_argument("--plot", type=Path, metavar="JSON", help="measure nothing, tabulate these results")
    reader.add_argument(
        "--accelerator", action="store_true", help="what is worth measuring on a GPU, in at most ten minutes"
    )
    add_smoke(reader, "the smallest task, a few rounds")
    options = reader.parse_args(arguments)
    if options.accelerator and options.device.type != "cuda" and not options.smoke:
        sys.exit("benchmark: --accelerator expects a GPU, and torch sees none; with --smoke a CPU does.")
    if options.smoke:
        options.tasks, options.seconds, options.probes = ["tiny 16x16"], 0, 8
        options.threads = 1  # a test may share the machine
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, save."""
    options = parse(arguments)
    try:
        path = options.plot or run(options)
        results = load(path)
    except ValueError as error:
        sys.exit(f"benchmark: {error}")
    if found := tables(results["runs"]):
        show(console(), *found)
        path.with_suffix(".md").write_text(markdown(*found))
    print(f"{path.with_suffix('')}.* written")
    if options.accelerator and (complaint := accelerator.verdict(results["runs"])):
        sys.exit(f"benchmark: {complaint}")


def run(options: Options) -> Path:
    """Measure the rows that were asked for; others in the results stay."""
    torch.set_num_threads(options.threads)
    name, order = ("accelerator", None) if options.accelerator else ("benchmark", list(CASES))
    path, begin = out(options) / f"{name}.json", time.perf_counter()
    measured = {row["task"]: row for row in load(path)["runs"]} if order and path.exists() else {}
    if options.accelerator:
        rows = accelerator.measure(options.device, smoke=options.smoke)
    else:
        rows = (measure(task, options) for task in options.tasks)
    configuration = {key: getattr(options, key) for key in ("seconds", "probes", "smoke")}
    for row in rows:
        measured[row["task"]] = row
        seconds = time.perf_counter() - begin
        print(f"{seconds:4.0f} s  {row['task']}: {row.get('left out', 'measured')}")
        ordered = [measured[task] for task in order or measured if task in measured]
        head = {"recipe": name, "configuration": configuration, "environment": environment(options.device)}
        save(path, {**head, "seconds": seconds, "runs": ordered})
    return path


if __name__ == "__main__":
    main()
