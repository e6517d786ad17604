"""What a step costs, relative to the same step of the plain base optimizer.

    python -m recipes.benchmark                                       # every row
    python -m recipes.benchmark --tasks "resnet18 head 10x512"        # one row; others in the results stay
    python -m recipes.benchmark --smoke                               # seconds: does everything run?

The candidates (recipes.benchmark.candidates) of a row alternate in one process, in an order that rotates;
every step is compared with the plain step of the same round, so that a busy machine slows both; the table
has the median of the ratios and their quartiles. Before anything is timed, the exact kappa is checked against
every other way to it: Hutchinson's estimate with many probes, the full Hessians, and other packages' traces.
Memory is the peak over one step of what is allocated, parameters and state included.
"""

import argparse
import copy
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from recipes.benchmark.candidates import CANDIDATES, Build, Candidate, Step, chosen, flatness, layer_alone
from recipes.benchmark.cases import TASKS, Task
from recipes.benchmark.memory import alive_bytes, peak_bytes
from recipes.benchmark.picture import plot
from recipes.engine.step_time import clock
from recipes.shared.results import load, record, save

SLOW, SLOW_EVERY = 5.0, 4  # a step of more seconds is timed in every fourth round only
ROUNDS = {"tiny 16x16": 400, "resnet50 head 1000x2048": 3}  # cheap and noisy; seconds a step
TOLERANCE = 1e-4  # of the check, relative, in float32
CHECK = "FAM hutchinson"  # checks the exact kappa whatever candidates were asked for


def check(task: Task, candidates: Mapping[str, Candidate], probes: int) -> dict[str, Any]:
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


def _reference(task: Task, reads: str) -> float:
    """The exact number that a candidate is compared with."""
    if reads == "trace":
        with layer_alone(task):
            (kappa_hat,) = flatness(task, measure="layerwise")
        return kappa_hat / task.weight.detach().square().sum().item()
    curvature = "gauss_newton" if reads == "Gauss-Newton" else "hessian"
    (kappa,) = flatness(_checked(task, reads), curvature=curvature)
    return kappa


def _checked(task: Task, reads: str) -> Task:
    """The part of the batch on which a number is checked: where samples interact, exact Gauss-Newton takes a
    product for each of their outputs."""
    return task.part(4) if reads == "Gauss-Newton" else task


def measure(
    name: str, labels: Sequence[str], rounds: int, probes: int, device: torch.device
) -> dict[str, Any]:
    """One row: check, then time all candidates in alternation, then their memory."""
    torch.manual_seed(0)
    task = TASKS[name]()
    task.model.to(device)
    task.inputs, task.targets = task.inputs.to(device), task.targets.to(device)
    candidates = chosen(labels, name)
    row: dict[str, Any] = {"task": name, "check": check(task, candidates, probes), "candidates": {}}
    steps: dict[str, Step] = {}
    every: dict[str, int] = {}
    for label, candidate in candidates.items():
        step = candidate.build(copy.deepcopy(task))
        try:
            step()
            every[label] = SLOW_EVERY if _timed(step, device) > SLOW and label != "plain" else 1
        except RuntimeError as error:  # a refusal is an answer too
            row["candidates"][label] = {"refused": str(error)}
        else:
            steps[label] = step
    order = list(steps)
    turns = []
    for number in range(rounds):
        first = number % len(order)
        taking = [label for label in (*order[first:], *order[:first]) if number % every[label] == 0]
        turns.append({label: _timed(steps[label], device) for label in taking})
    steps.clear()
    peaks = {label: _peak(task, candidates[label].build, device) for label in order}
    for label in order:
        pairs = [(turn[label], turn["plain"]) for turn in turns if label in turn]
        ratios = sorted(own / reference for own, reference in pairs)
        row["candidates"][label] = {
            "ratio": statistics.median(ratios),
            "quartiles": [ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]],
            "rounds": len(ratios),
            "seconds": statistics.median(own for own, _ in pairs),
            "extra_seconds": statistics.median(own - reference for own, reference in pairs),
            "memory": peaks[label] / peaks["plain"],
            "peak_bytes": peaks[label],
        }
    return row


def _peak(task: Task, build: Build, device: torch.device) -> int:
    """Peak memory of a step of one candidate alone."""
    others = alive_bytes(device)
    step = build(copy.deepcopy(task))
    step()  # creates the optimizer's state
    return peak_bytes(step, device) - others


def _timed(step: Step, device: torch.device) -> float:
    begin = clock(device)
    step()
    return clock(device) - begin


def tables(rows: Sequence[dict[str, Any]]) -> tuple[Table, Table]:
    """Time, with quartiles, and peak memory, both relative to the plain step."""

    def ratio(result: dict[str, Any]) -> str:
        low, high = result["quartiles"]
        return f"{result['ratio']:.2f} ({low:.2f}-{high:.2f})"

    def memory(result: dict[str, Any]) -> str:
        return f"{result['memory']:.2f}"

    return (
        _table("time", rows, lambda result: f"{1000 * result['seconds']:.3g} ms", ratio),
        _table("peak memory", rows, lambda result: f"{result['peak_bytes'] / 1e6:.3g} MB", memory),
    )


def _table(
    title: str,
    rows: Sequence[dict[str, Any]],
    absolute: Callable[[dict[str, Any]], str],
    relative: Callable[[dict[str, Any]], str],
) -> Table:
    labels = list(dict.fromkeys(label for row in rows for label in row["candidates"]))
    table = Table("task", *labels, title=f"{title}, relative to the plain step", box=box.MARKDOWN)
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
    parser = argparse.ArgumentParser(
        prog="python -m recipes.benchmark", description=(__doc__ or "").split("\n")[0]
    )
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), metavar="TASK")
    parser.add_argument("--candidates", nargs="+", choices=CANDIDATES, default=list(CANDIDATES))
    parser.add_argument("--rounds", type=int, default=12, help="steps of every candidate")
    parser.add_argument("--probes", type=int, default=32, help="of the check")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", type=torch.device, default=torch.device(default_device))
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark"))
    parser.add_argument(
        "--smoke", action="store_true", help="the smallest task, three rounds: a test, no result"
    )
    options = parser.parse_args(arguments)
    if options.smoke:
        options.tasks, options.rounds, options.probes = ["tiny 16x16"], 3, 8
        options.threads = 1  # a test may share the machine
    torch.set_num_threads(options.threads)
    console = Console(width=320)
    for label in options.candidates:
        if not CANDIDATES[label].available:
            console.print(f"{label}: left out, pip install {CANDIDATES[label].package}")
    path = options.out / "benchmark.json"
    measured = {row["task"]: row for row in load(path)["runs"]} if path.exists() else {}
    begin = time.perf_counter()
    for name in options.tasks:
        with console.status(name):
            rounds = options.rounds if options.smoke else ROUNDS.get(name, options.rounds)
            measured[name] = measure(name, options.candidates, rounds, options.probes, options.device)
        rows = [measured[task] for task in TASKS if task in measured]
        configuration = {"rounds": options.rounds, "probes": options.probes, "smoke": options.smoke}
        save(path, record("benchmark", configuration, time.perf_counter() - begin, rows, options.device))
    console.print(*tables(rows))
    plot(path, path.with_suffix(".png"))
    console.print(f"{path} and {path.with_suffix('.png')} written")


if __name__ == "__main__":
    main()
