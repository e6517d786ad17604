"""Where to be flat? Runs the study's trials on all cores, and reports on what was measured.

python -m recipes.study                                  # everything; stop and start again at will
python -m recipes.study --stages sgd tuning --tasks digits   # a part of it
python -m recipes.study --cost                           # time of a step, on a quiet machine
python -m recipes.study --report recipes/results/study   # tables and pictures from saved results
python -m recipes.study --smoke                          # does everything run?
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from itertools import chain
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

from recipes.engine.task import Missing
from recipes.shared import command
from recipes.shared.results import CPU, compact, environment
from recipes.study import protocol
from recipes.study.analysis import Results
from recipes.study.cost import relative_costs
from recipes.study.methods import METHODS
from recipes.study.pictures import draw
from recipes.study.protocol import CONDITIONS, STAGES, measured, missing
from recipes.study.report import write
from recipes.study.tasks import TASKS, samples
from recipes.study.trial import Trial, run


def read(folder: Path) -> dict[str, Results]:
    """What was measured so far, by stage."""
    return {stage: [json.loads(line) for line in lines(folder / f"{stage}.jsonl")] for stage in STAGES}


def lines(path: Path) -> list[str]:
    """The lines that were written to their end: a kill may leave half of one."""
    return [line for line in path.read_text().splitlines() if line.endswith("}")] if path.exists() else []


def pending(stage: str, stages: dict[str, Results], tasks: Sequence[str] = tuple(TASKS)) -> list[Trial]:
    """The stage's trials that were not measured yet."""
    return missing(list(chain(*stages.values())), (trial for trial in wanted(stage, stages) if trial.task in tasks))


def wanted(stage: str, stages: dict[str, Results]) -> Iterator[Trial]:
    """The stage's trials, given all that was measured so far."""
    return STAGES[stage](list(chain(*stages.values())))


def execute(trials: Sequence[Trial], workers: int) -> Iterator[dict[str, Any]]:
    """The results of the trials as they come in."""
    with ProcessPoolExecutor(
        workers, mp_context=get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        futures = [pool.submit(run, trial) for trial in trials]
        try:
            for future in as_completed(futures):
                yield future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def run_stage(stage: str, options: argparse.Namespace, console: Console) -> None:
    """Train what the stage still lacks; every trial is a line as soon as it is finished."""
    path: Path = options.out / f"{stage}.jsonl"
    path.write_text("".join(f"{line}\n" for line in lines(path)))
    while trials := pending(stage, read(options.out), options.tasks):  # a choice at an edge asks for more
        with path.open("a") as file:
            results = execute(trials, options.workers)
            for result in track(results, stage, len(trials), console=console):
                file.write(json.dumps(compact(result)) + "\n")
                file.flush()


def smoke(console: Console) -> None:
    """One step of every method, and one epoch of every task, tested."""
    for condition in CONDITIONS:
        trial = protocol.trial(condition, "FAM, hidden, detached", 1e-3, 0, lr=0.01, epochs=1, tested=True)
        console.print(condition.name, compact(run(trial)))
    for name, method in METHODS.items():
        trial = protocol.trial(CONDITIONS[0], name, (method.start or (0.01,))[0], 0, lr=0.01, epochs=1)
        result = run(replace(trial, task="fashion") if "convolution" in name else trial)
        console.print(name, result["validation"])


def report(folder: Path, console: Console) -> None:
    """Write the tables and pictures of what is complete."""
    stages = read(folder)
    complete = {}
    for stage, results in stages.items():
        trials = list(wanted(stage, stages))
        lacking = {(trial.task, trial.noise, trial.variant) for trial in missing(results, trials)}
        found = measured(results, trials)
        complete[stage] = [r for r in found if (r["task"], r["noise"], r["variant"]) not in lacking]
        for task, noise, variant in sorted(lacking):
            console.print(f"{stage}: {task}, {noise:.0%} {variant} is not complete, left out of the report")
    costs = json.loads(path.read_text()) if (path := folder / "cost.json").exists() else {}
    write(complete, costs, folder / "tables.md")
    draw(complete, costs, folder)
    console.print(f"{folder}: tables.md and pictures written")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the stages, then report."""
    parser = command.parser("study", __doc__)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES), metavar="STAGE")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), metavar="TASK")
    parser.add_argument(
        "--workers", type=command.positive, default=os.cpu_count() or 1, help="networks trained at a time"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/study"))
    parser.add_argument("--cost", action="store_true", help="time steps, train nothing")
    parser.add_argument("--report", type=Path, metavar="FOLDER", help="report on these, train nothing")
    parser.add_argument("--smoke", action="store_true", help="one epoch of each kind: a test, no result")
    options = parser.parse_args(arguments)
    console = Console(width=160)
    if options.report is not None:
        report(options.report, console)
        return
    if options.smoke:
        smoke(console)
        return
    options.out.mkdir(parents=True, exist_ok=True)
    if options.cost:
        cost = {"environment": environment(CPU), "tasks": relative_costs(options.tasks)}
        (options.out / "cost.json").write_text(json.dumps(compact(cost), indent=1) + "\n")
        return
    try:
        for task in options.tasks:
            samples(task, 0, 0)
        for stage in options.stages:
            run_stage(stage, options, console)
    except Missing as missing_data:
        sys.exit(str(missing_data))
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on where it was")
    report(options.out, console)


if __name__ == "__main__":
    main()
