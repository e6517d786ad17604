"""Measures what a training step costs with FAM and SAM, relative to a step of plain SGD.

    python -m recipes.benchmark                                 # every row
    python -m recipes.benchmark --tasks "resnet18 hidden"       # one row; others in the results stay
    python -m recipes.benchmark --accelerator                   # a GPU's rows, in ten minutes

A row is a network, a column a training step. The steps of a row take turns in one process, and each is
compared with the plain step of the same round, so that a busy machine slows both. Before anything is timed,
the exact kappa is compared with the mean of its random estimates.
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
from recipes.shared.command import SEVERAL, Options, in_a_sentence, out, parser, positive
from recipes.shared.results import environment, load, save
from recipes.shared.tables import console, markdown, show


def measure(name: str, options: Options) -> dict[str, Any]:
    """Measures one row: checks kappa, then times all candidates in turns."""
    torch.manual_seed(0)
    problem = CASES[name].build().copy(device=options.device)
    candidates = chosen(options.candidates, name)
    checked = check(copy.deepcopy(problem), candidates.values(), options.probes)
    steps, results = prepared(problem, candidates, options.device)
    timed = timings(steps, candidates, options.seconds, options.device)
    found = {label: {**own, **timed.get(label, {})} for label, own in results.items()}
    return {"task": name, "check": checked, "candidates": found}


def parse(arguments: Sequence[str] | None) -> Options:
    """Reads the command line."""
    layers = {name: "; all layers but the last" if name in HIDDEN else "" for name in CASES}
    listed = {f"row {name}": f"{case.about}{layers[name]}" for name, case in CASES.items()}
    listed |= {f"column {label}": candidate.about for label, candidate in CANDIDATES.items()}
    smoke = "the smallest task, a few rounds"
    reader = parser(
        *("benchmark", __doc__, "--device", "--plot"), out=Path("runs/benchmark"), smoke=smoke, listed=listed
    )
    for option, names, metavar in (("--tasks", CASES, "ROW"), ("--candidates", CANDIDATES, "COLUMN")):
        reader.add_argument(
            option, **SEVERAL, choices=names, default=list(names), metavar=metavar, help="(default: all)"
        )
    reader.add_argument("--seconds", type=positive, default=60, help="for a row, about (default: 60)")
    reader.add_argument("--probes", type=positive, default=32, help="estimates in the check (default: 32)")
    reader.add_argument("--threads", type=positive, default=2, help="CPU threads (default: 2)")
    worth = "what is worth measuring on a GPU, in at most ten minutes"
    reader.add_argument("--accelerator", action="store_true", help=worth)
    options = reader.parse_args(arguments)
    if options.accelerator and options.device.type != "cuda" and not options.smoke:
        sys.exit("benchmark: --accelerator expects a GPU, and torch sees none; with --smoke a CPU does.")
    if options.smoke:  # a test may share the machine
        vars(options).update(tasks=["tiny 16x16"], seconds=0, probes=8, threads=1)
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, prints and saves."""
    options = parse(arguments)
    with in_a_sentence("benchmark"):
        path = options.plot or run(options)
        results = load(path)
        if found := tables(results["runs"]):
            show(console(), *found)
            path.with_suffix(".md").write_text(markdown(*found))
        print(f"{path.with_suffix('')}.* written")
        if options.accelerator and (complaint := accelerator.verdict(results["runs"])):
            raise ValueError(complaint)


def run(options: Options) -> Path:
    """Measures the rows that were asked for; other rows in the results stay."""
    torch.set_num_threads(options.threads)
    name = "accelerator" if options.accelerator else "benchmark"
    path, begin = out(options) / f"{name}.json", time.perf_counter()
    if options.accelerator:
        measured, rows = {}, accelerator.measure(options.device, smoke=options.smoke)
    else:
        measured = {row["task"]: row for row in load(path)["runs"]} if path.exists() else {}
        rows = (measure(task, options) for task in options.tasks)
    configuration = {key: getattr(options, key) for key in ("seconds", "probes", "smoke")}
    head = {"recipe": name, "configuration": configuration, "environment": environment(options.device)}
    for row in rows:
        measured[row["task"]] = row
        seconds = time.perf_counter() - begin
        print(f"{seconds:4.0f} s  {row['task']}: {row.get('left out', 'measured')}")
        ordered = sorted(measured.values(), key=lambda row: [*CASES, row["task"]].index(row["task"]))
        save(path, {**head, "seconds": seconds, "runs": ordered})
    return path


if __name__ == "__main__":
    main()
