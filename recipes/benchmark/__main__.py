"""What a step costs, relative to the same step of the plain base optimizer.

    python -m recipes.benchmark                                       # every row
    python -m recipes.benchmark --tasks "resnet18 head 10x512"        # one row; others in the results stay
    python -m recipes.benchmark --smoke                               # seconds: does everything run?
    python -m recipes.benchmark --accelerator                         # a GPU's rows, in ten minutes

The candidates (recipes.benchmark.candidates) of a row alternate in one process, in an order that rotates;
every step is compared with the plain step of the same round, so that a busy machine slows both; the table
has the median of the ratios and their quartiles. Before anything is timed, the exact kappa is checked against
every other way to it: Hutchinson's estimate with many probes, the full Hessians, and other packages' traces.
Memory is the peak over one step of what is allocated, parameters and state included.
"""

import copy
import math
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from recipes.benchmark import accelerator
from recipes.benchmark.candidates import CANDIDATES, Build, Candidate, Step, chosen, flatness, layer_alone
from recipes.benchmark.cases import TASKS
from recipes.benchmark.memory import alive_bytes, peak_bytes
from recipes.benchmark.picture import plot
from recipes.shared.command import Options, add_device, add_smoke, out, parser, positive
from recipes.shared.pictures import save as save_picture
from recipes.shared.problem import Problem
from recipes.shared.results import load, record, save
from recipes.shared.tables import console, show
from recipes.shared.tables import table as make_table
from recipes.shared.timing import alternate, median, ratio, timed, with_quartiles

SLOW, SLOW_EVERY = 5.0, 4  # a step of more seconds is timed in every fourth round only
ROUNDS = {  # the quick are noisy, the slow are dear
    "tiny 16x16": 400,
    "small conv net hidden 128x1568": 150,
    "perceptron 4x1024 all layers": 40,
    "resnet50 head 1000x2048": 3,
}
TOLERANCE = 1e-4  # of the check, relative, in float32
CHECK = "FAM hutchinson"  # checks the exact kappa whatever candidates were asked for


def check(task: Problem, candidates: Mapping[str, Candidate], probes: int) -> dict[str, Any]:
    """Every candidate's number, the random ones' mean and standard error, beside the exact one.

    Raises:
        AssertionError: if one is more than five standard errors and the tolerance away.
    """
    checked = {label: c for label, c in candidates.items() if c.draws is not None}
    if any(c.reads == "kappa" for c in checked.values()):
        checked[CHECK] = CANDIDATES[CHECK]
    result: dict[str, Any] = {}
    for reads in dict.fromkeys(c.reads for c in checked.values()):
        try:
            result[reads] = _reference(copy.deepcopy(task), reads)  # a forward changes batch statistics
        except RuntimeError as error:
            result[reads] = {"refused": str(error)}
    for label, candidate in checked.items():
        exact = result[candidate.reads]
        if not isinstance(exact, float):
            continue
        assert candidate.draws is not None
        try:
            values = candidate.draws(_checked(copy.deepcopy(task), candidate.reads), probes)
        except RuntimeError as error:
            result[label] = {"refused": str(error)}
            continue
        mean, spread = statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0
        error_of_mean = spread / math.sqrt(len(values))
        if not abs(mean - exact) <= 5 * error_of_mean + TOLERANCE * abs(exact):
            raise AssertionError(f"{label}: expected {exact}, got {mean} +- {error_of_mean}")
        result[label] = {"mean": mean, "standard_error": error_of_mean}
    return result


def _reference(task: Problem, reads: str) -> float:
    """The exact number that a candidate is compared with."""
    if reads == "trace":
        with layer_alone(task):
            (kappa_hat,) = flatness(task, measure="layerwise")
        return kappa_hat / task.weight.detach().square().sum().item()
    curvature = "gauss_newton" if reads == "Gauss-Newton" else "hessian"
    (kappa,) = flatness(_checked(task, reads), curvature=curvature)
    return kappa


def _checked(task: Problem, reads: str) -> Problem:
    """The part of the batch on which a number is checked: where samples interact, exact Gauss-Newton takes a
    product for each of their outputs."""
    return task.part(4) if reads == "Gauss-Newton" else task


def measure(
    name: str, labels: Sequence[str], rounds: int, probes: int, device: torch.device
) -> dict[str, Any]:
    """One row: check, then time all candidates in alternation, then their memory."""
    torch.manual_seed(0)
    task = TASKS[name]().copy(device=device)
    candidates = chosen(labels, name)
    row: dict[str, Any] = {"task": name, "check": check(task, candidates, probes), "candidates": {}}
    steps: dict[str, Step] = {}
    every: dict[str, int] = {}
    for label, candidate in candidates.items():
        step = candidate.build(copy.deepcopy(task))
        try:
            seconds, _ = timed(step, device)
        except RuntimeError as error:  # a refusal is an answer too
            row["candidates"][label] = {"refused": str(error)}
        else:
            steps[label] = step
            every[label] = SLOW_EVERY if seconds > SLOW and label != "plain" else 1
    seconds_of = alternate(steps, rounds, device, every=every)
    steps.clear()
    peaks = {label: _peak(task, candidates[label].build, device) for label in seconds_of}
    for label, own in seconds_of.items():
        middle, quartiles = ratio(own, seconds_of["plain"])
        extra = [a - b for a, b in zip(own, seconds_of["plain"], strict=True)]
        row["candidates"][label] = {
            "ratio": middle,
            "quartiles": quartiles,
            "rounds": -(-rounds // every[label]),
            "seconds": median(own)[0],
            "extra_seconds": median(extra)[0],
            "memory": peaks[label] / peaks["plain"],
            "peak_bytes": peaks[label],
        }
    return row


def _peak(task: Problem, build: Build, device: torch.device) -> int:
    """Peak memory of a step of one candidate alone."""
    others = alive_bytes(device)
    step = build(copy.deepcopy(task))
    step()  # creates the optimizer's state
    return peak_bytes(step, device) - others


def tables(rows: Sequence[dict[str, Any]]) -> tuple[Table, Table]:
    """Time, with quartiles, and peak memory, both relative to the plain step."""

    def ratio(result: dict[str, Any]) -> str:
        return with_quartiles(result["ratio"], result["quartiles"])

    def memory(result: dict[str, Any]) -> str:
        return f"{result['memory']:.2f}" if "memory" in result else "not measured"

    def peak(result: dict[str, Any]) -> str:
        return f"{_readable(result['peak_bytes'] / 1e6)} MB" if "memory" in result else "not measured"

    return (
        _table("time", rows, lambda result: f"{_readable(1000 * result['seconds'])} ms", ratio),
        _table("peak memory", rows, peak, memory),
    )


def _readable(number: float) -> str:
    """Three digits, or all that stand before the point."""
    return f"{number:,.0f}" if number >= 1000 else f"{number:.3g}"


def _table(
    title: str,
    rows: Sequence[dict[str, Any]],
    absolute: Callable[[dict[str, Any]], str],
    relative: Callable[[dict[str, Any]], str],
) -> Table:
    labels = list(dict.fromkeys(label for row in rows for label in row["candidates"]))
    table = make_table("task", *labels, title=f"{title}, relative to the plain step")
    for row in rows:
        cells = []
        for label in labels:
            result = row["candidates"].get(label, {})
            cell = absolute if label == "plain" else relative
            cells.append("refused" if "refused" in result else cell(result) if result else "")
        table.add_row(row["task"], *cells)
    return table


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, save."""
    reader = parser("benchmark", __doc__)
    reader.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), metavar="TASK")
    reader.add_argument("--candidates", nargs="+", choices=CANDIDATES, default=list(CANDIDATES))
    reader.add_argument("--rounds", type=positive, default=12, help="steps of every candidate")
    reader.add_argument("--probes", type=positive, default=32, help="of the check")
    reader.add_argument("--threads", type=positive, default=2)
    add_device(reader)
    reader.add_argument("--out", type=Path, default=Path("runs/benchmark"))
    reader.add_argument("--plot", type=Path, metavar="JSON", help="measure nothing, draw these results")
    reader.add_argument(
        "--accelerator", action="store_true", help="what is worth measuring on a GPU, in at most ten minutes"
    )
    add_smoke(reader, "the smallest task, three rounds")
    options = reader.parse_args(arguments)
    if options.accelerator:
        run_accelerator(options)
        return
    if options.smoke:
        options.tasks, options.rounds, options.probes = ["tiny 16x16"], 3, 8
        options.threads = 1  # a test may share the machine
    try:
        path = options.plot or run(options)
        results = load(path)
    except ValueError as error:
        sys.exit(f"benchmark: {error}")
    show(console(), *tables(results["runs"]))
    save_picture(plot(results), path.with_suffix(".png"))
    print(f"{path.with_suffix('.png')} written")


def run(options: Options) -> Path:
    """Measure the rows that were asked for; others in the results stay."""
    torch.set_num_threads(options.threads)
    for label in options.candidates:
        if not CANDIDATES[label].available:
            print(f"{label}: left out, pip install {CANDIDATES[label].package}")
    path = out(options) / "benchmark.json"
    measured = {row["task"]: row for row in load(path)["runs"]} if path.exists() else {}
    begin = time.perf_counter()
    for name in options.tasks:
        with console().status(name):
            rounds = options.rounds if options.smoke else ROUNDS.get(name, options.rounds)
            measured[name] = measure(name, options.candidates, rounds, options.probes, options.device)
        rows = [measured[task] for task in TASKS if task in measured]
        configuration = {"rounds": options.rounds, "probes": options.probes, "smoke": options.smoke}
        save(path, record("benchmark", configuration, time.perf_counter() - begin, rows, options.device))
    return path


def run_accelerator(options: Options) -> None:
    """Measure, save and print the rows of `recipes.benchmark.accelerator`."""
    if options.device.type != "cuda" and not options.smoke:
        sys.exit("benchmark: --accelerator expects a GPU, and torch sees none; with --smoke a CPU does.")
    path, begin = out(options) / "accelerator.json", time.perf_counter()
    rows: list[dict[str, Any]] = []
    for row in accelerator.measure(options.device, smoke=options.smoke):
        rows.append(row)
        seconds = time.perf_counter() - begin
        print(f"{seconds:4.0f} s  {row['task']}: {row.get('left out', 'measured')}")
        save(path, record("accelerator", {"smoke": options.smoke}, seconds, rows, options.device))
    show(console(), *tables(rows))
    print(f"{path} written")
    if complaint := accelerator.verdict(rows):
        sys.exit(f"benchmark: {complaint}")


if __name__ == "__main__":
    main()
