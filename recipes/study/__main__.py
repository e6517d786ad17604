"""Does FAM help? Runs the study's trials on all cores, and reports on what was measured.

    python -m recipes.study                              # everything; stop and start again at will
    python -m recipes.study --stages comparison          # one part of it
    python -m recipes.study --report recipes/results/study   # tables and pictures from saved results
    python -m recipes.study --smoke                      # does everything run?

Fashion-MNIST's whole training set is read from --data (torchvision's layout); stages that need it are left
out where it is missing.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, fields, replace
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
from recipes.study.analysis import Results
from recipes.study.cost import relative_costs
from recipes.study.pictures import draw
from recipes.study.protocol import STAGES
from recipes.study.report import write
from recipes.study.samples import samples
from recipes.study.trial import Trial, run


def read(folder: Path) -> dict[str, Results]:
    """What was measured so far, by stage."""
    return {stage: [json.loads(line) for line in lines(folder / f"{stage}.jsonl")] for stage in STAGES}


def lines(path: Path) -> list[str]:
    """The lines that were written to their end: a kill may leave half of one."""
    return [line for line in path.read_text().splitlines() if line.endswith("}")] if path.exists() else []


def pending(stage: str, results: Results, smoke: bool = False) -> list[Trial]:
    """The stage's trials that were not measured yet."""
    names = [field.name for field in fields(Trial)]
    done = {tuple(r[name] for name in names) for r in results}
    trials = STAGES[stage](results)
    if smoke:  # one of each kind, briefly
        kinds = {(t.task, t.method, t.noise, t.base): replace(t, epochs=1) for t in possible(trials)}
        trials = (trial for trial in kinds.values() if trial.noise == 0.4)
    return [trial for trial in dict.fromkeys(trials) if tuple(asdict(trial).values()) not in done]


def possible(trials: Iterator[Trial]) -> Iterator[Trial]:
    """Those up to the first that asks for what a smoke test has left out of an earlier stage."""
    try:
        yield from trials
    except ValueError:
        return


def execute(trials: Sequence[Trial], options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The results of the trials as they come in."""
    with ProcessPoolExecutor(
        options.workers, mp_context=get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        futures = [pool.submit(run, trial, options.data) for trial in trials]
        try:
            for future in as_completed(futures):
                yield future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def run_stage(stage: str, options: argparse.Namespace, console: Console) -> None:
    """Train what the stage still lacks; every trial is a line as soon as it is finished."""
    trials = pending(stage, list(chain(*read(options.out).values())), options.smoke)
    if not trials:
        return
    try:
        for task in {trial.task for trial in trials}:
            samples(task, 0, 0, options.data)
    except Missing as missing:
        console.print(f"{stage}: left out, {missing}")
        return
    path: Path = options.out / f"{stage}.jsonl"
    path.write_text("".join(f"{line}\n" for line in lines(path)))
    with path.open("a") as file:
        for result in track(execute(trials, options), stage, len(trials), console=console):
            file.write(json.dumps(compact(result)) + "\n")
            file.flush()


def report(folder: Path, console: Console) -> None:
    """Write the tables and pictures of the stages that are complete."""
    stages = read(folder)
    results = list(chain(*stages.values()))
    for stage in STAGES:
        if not stages[stage] or pending(stage, results):
            console.print(f"{stage}: not complete, left out of the report")
            stages[stage] = []
    write(stages, folder / "tables.md")
    draw(stages, json.loads((folder / "cost.json").read_text()), folder)
    console.print(f"{folder}: tables.md and pictures written")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the stages, then report."""
    parser = command.parser("study", __doc__)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES), metavar="STAGE")
    parser.add_argument(
        "--workers", type=command.positive, default=os.cpu_count() or 1, help="networks trained at a time"
    )
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder of the data sets")
    parser.add_argument("--out", type=Path, default=Path("runs/study"))
    parser.add_argument("--report", type=Path, metavar="FOLDER", help="report on these, train nothing")
    command.add_smoke(parser, "one epoch of each kind")
    options = parser.parse_args(arguments)
    console = Console(width=160)
    if options.report is not None:
        report(options.report, console)
        return
    options.out = command.out(options)
    if options.smoke:
        command.fresh(options.out)
    options.out.mkdir(parents=True, exist_ok=True)
    if not (options.out / "cost.json").exists():
        cost = relative_costs("fashion-2000", options.data, 5 if options.smoke else 310)
        cost["environment"] = environment(CPU)
        (options.out / "cost.json").write_text(json.dumps(compact(cost), indent=1) + "\n")
    for stage in options.stages:
        try:
            run_stage(stage, options, console)
        except KeyboardInterrupt:
            sys.exit(f"{stage}: stopped; the same command goes on where it was")
    if not options.smoke:
        report(options.out, console)


if __name__ == "__main__":
    main()
