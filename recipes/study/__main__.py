"""Trains the study's networks with FAM, SAM and other methods on all cores, and makes tables and pictures.

    python -m recipes.study                                     # everything; stop and start again at will
    python -m recipes.study --stages defaults --tasks digits    # a part of it
    python -m recipes.study --cost                              # time of a step, on a quiet machine
    python -m recipes.study --report recipes/results/study      # tables and pictures from saved results

recipes/study/README.md says what came out.
"""

import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from itertools import chain
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

from recipes.engine.task import Missing, Source
from recipes.shared import command
from recipes.shared.command import Options
from recipes.shared.results import CPU, compact, environment
from recipes.shared.tables import markdown
from recipes.study import conditions
from recipes.study.analysis import Results
from recipes.study.conditions import CONDITIONS, LANGUAGE, TASKS
from recipes.study.cost import relative_costs
from recipes.study.methods import METHODS
from recipes.study.pictures import draw
from recipes.study.sections import sections
from recipes.study.stages import STAGES
from recipes.study.trial import Trial, filled, measured, missing, run, shortened


def read(folder: Path) -> dict[str, Results]:
    """Returns what was measured so far, by stage."""
    files = {stage: lines(folder / f"{stage}.jsonl") for stage in STAGES}
    return {stage: [filled(json.loads(line)) for line in found] for stage, found in files.items()}


def lines(path: Path) -> list[str]:
    """Returns the lines that were written to their end, since a kill may leave half of one."""
    return [line for line in path.read_text().splitlines() if line.endswith("}")] if path.exists() else []


def pending(stage: str, options: Options) -> list[Trial]:
    """Returns the stage's trials that were not measured yet, in this stage or in another."""
    everything = list(chain(*read(options.out).values()))
    return missing(everything, (trial for trial in STAGES[stage](everything) if trial.task in options.tasks))


def execute(trials: Sequence[Trial], workers: int) -> Iterator[dict[str, Any]]:
    """Yields the results of the trials as they come in."""
    with ProcessPoolExecutor(
        workers, mp_context=get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        try:
            yield from (done.result() for done in as_completed([pool.submit(run, trial) for trial in trials]))
        finally:
            pool.shutdown(cancel_futures=True)


def run_stage(stage: str, options: Options, console: Console) -> None:
    """Trains what the stage still lacks; every trial is a line in its file as soon as it is finished."""
    path: Path = options.out / f"{stage}.jsonl"
    path.write_text("".join(f"{line}\n" for line in lines(path)))
    while trials := pending(stage, options):  # a best value at the edge of a grid asks for more
        with path.open("a") as file:
            for result in track(execute(trials, options.workers), stage, len(trials), console=console):
                file.write(json.dumps(compact(shortened(result))) + "\n")
                file.flush()


def smoke(console: Console) -> None:
    """Trains and tests every condition, and trains every method, for one epoch of a few samples."""
    few, short = Source(smoke=True), {"lr": 0.01, "epochs": 1, "every": 2}
    for condition in CONDITIONS:
        trial = conditions.trial(condition, "FAM, proximal", 1.0, 0, **short, tested=True)
        console.print(condition.name, compact(shortened(run(trial, few))))
    for name, method in METHODS.items():
        trial = conditions.trial(CONDITIONS[0], name, (method.start or (0.01,))[0], 0, **short)
        console.print(name, run(trial, few)["validation"])


def report(folder: Path, console: Console) -> None:
    """Writes the tables and pictures of what was measured."""
    stages = read(folder)
    if not any(stages.values()):
        remedy = "python -m recipes.study --out FOLDER makes one"
        raise Missing(f"{folder}: expected a folder with the study's results: {remedy}")
    everything = list(chain(*stages.values()))
    found = {stage: measured(everything, STAGES[stage](everything)) for stage in STAGES}
    costs = json.loads(path.read_text()) if (path := folder / "cost.json").exists() else {}
    text = markdown(*sections(found, everything, costs))
    (folder / "tables.md").write_text(f"# Tables of the study\n\n{text}")
    draw(found, costs, folder)
    console.print(f"{folder}: tables and pictures written", soft_wrap=True)


def parse(arguments: Sequence[str] | None) -> Options:
    """Reads the command line."""
    listed = {f"stage {name}": (stage.__doc__ or "").splitlines()[0] for name, stage in STAGES.items()}
    for task in TASKS:
        names = (c.name for c in (*CONDITIONS, *LANGUAGE) if c.task == task)
        listed[f"task {task}"] = "; ".join(names)
    parser = command.parser("study", __doc__, out=Path("runs/study"), listed=listed)
    for option, choices in (("--stages", list(STAGES)), ("--tasks", list(TASKS))):
        common: dict[str, Any] = {"metavar": option[2:-1].upper(), "help": "(default: all)"}
        parser.add_argument(option, nargs="+", choices=choices, default=choices, **common)
    workers = "networks trained at a time (default: number of CPU cores)"
    parser.add_argument("--workers", type=command.positive, default=os.cpu_count() or 1, help=workers)
    parser.add_argument("--cost", action="store_true", help="measure the time of a step, train nothing")
    parser.add_argument(
        "--report",
        type=Path,
        metavar="FOLDER",
        help="make tables and pictures of these results, train nothing",
    )
    parser.add_argument("--smoke", action="store_true", help="a quick test: one epoch of each kind")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the stages, then reports."""
    options, console = parse(arguments), Console(width=160)
    with command.in_a_sentence("study", "stopped; the same command goes on where it was", (Missing,)):
        if options.report is not None:
            report(options.report, console)
        elif options.smoke:
            smoke(console)
        else:
            measure(options, console)


def measure(options: Options, console: Console) -> None:
    """Measures the time of a step, or trains what is lacking and reports."""
    options.out.mkdir(parents=True, exist_ok=True)
    if options.cost:
        cost = {"environment": environment(CPU), "tasks": relative_costs(options.tasks)}
        (options.out / "cost.json").write_text(json.dumps(compact(cost), indent=1) + "\n")
        return
    for task in options.tasks:
        conditions.usual(task).data(Source(download=True), 0)  # missing data are fetched, or reported, now
    for stage in options.stages:
        run_stage(stage, options, console)
    report(options.out, console)


if __name__ == "__main__":
    main()
