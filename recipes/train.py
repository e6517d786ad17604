"""Train a task with one optimizer or several, with one seed or several.

    python -m recipes.train cifar10 --optimizer sgd sam fam --seeds 0 1 2     # the paper's settings
    python -m recipes.train cifar10 --optimizer fam --mode proximal           # FAM as recommended
    python -m recipes.train skulls --optimizer fam --lam 0 0.0006 0.002 0.02 0.1 0.7
    python -m recipes.train cifar10 --optimizer fam --resume                  # go on after a stop
    python -m recipes.train cifar10 --smoke                                   # does everything run?

Each combination is a run with a folder of its own, such as runs/cifar10/fam-lam=0.1/seed0, which
``recipes.report`` turns into tables and pictures. Options not given are the task's: the paper's settings.
With ``--mode proximal`` they are FAM's own: all layers but the last, lam 1, every 10 steps.
"""

import argparse
import dataclasses
import itertools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from recipes.engine.loop import Conditions
from recipes.engine.optimizers import (
    FAM_OPTIONS,
    MEASURING,
    OPTIMIZERS,
    OPTIONS,
    PROXIMAL,
    SAM_OPTIONS,
    Settings,
    settings,
)
from recipes.engine.task import Missing, Source, Task
from recipes.engine.training import train
from recipes.shared import command
from recipes.shared.tables import console as make_console
from recipes.tasks import TASKS, load_task

SWEPT = ("lr", "weight_decay", "lam", "rho")  # these take several values, each a run of its own
CHOSEN = ("every", "normalize", "detach_hessian")  # these take one, and are FAM's alone


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = command.parser("train", __doc__, {name: task.about for name, task in TASKS.items()})
    parser.add_argument("task", choices=TASKS, metavar="task", help="one of those below")
    parser.add_argument(
        "--optimizer", nargs="+", action=command.Distinct, choices=OPTIMIZERS, default=["fam"]
    )
    command.add_seeds(parser)
    parser.add_argument("--epochs", type=command.positive)
    parser.add_argument("--batch-size", type=command.positive)
    for name in SWEPT:
        several: dict[str, Any] = {"nargs": "+", "action": command.Distinct, "metavar": name.upper()}
        parser.add_argument(f"--{name.replace('_', '-')}", type=command.number, **several)
    parser.add_argument(
        "--layer", nargs="+", metavar="NAME", help="module names, or: all, hidden, last, first"
    )
    parser.add_argument("--curvature", choices=("hessian", "gauss_newton"))
    parser.add_argument("--measure", choices=("neuronwise", "layerwise"))
    parser.add_argument("--mode", choices=("exact", "hutchinson", "full", "proximal"))
    parser.add_argument("--every", type=command.positive, help="steps between two proximal ones")
    parser.add_argument("--n-samples", type=command.positive, help="random vectors of an estimate")
    parser.add_argument("--normalize", action=argparse.BooleanOptionalAction, help="divide kappa by m")
    parser.add_argument(
        "--detach-hessian", action=argparse.BooleanOptionalAction, help="as the released code"
    )
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder of the data sets")
    parser.add_argument("--download", action="store_true", help="fetch (or generate) data that are missing")
    parser.add_argument("--workers", type=int, default=0, help="processes that load the samples")
    command.add_device(parser)
    parser.add_argument("--out", type=Path, default=Path("runs"))
    parser.add_argument("--resume", action="store_true", help="go on with the runs that were begun")
    parser.add_argument("--keep", type=command.positive, metavar="N", help="every Nth epoch's network too")
    command.add_smoke(parser, "one epoch of a few samples")
    return parser.parse_args(arguments)


def kappa_asked(options: argparse.Namespace) -> dict[str, Any]:
    """What was asked of kappa, of the penalty and of what is measured after every epoch alike."""
    return {name: getattr(options, name) for name in MEASURING if getattr(options, name) is not None}


def adapted(task: Task, options: argparse.Namespace) -> Task:
    """The task with the layers and the kappa that were asked for."""
    proximal = options.mode == "proximal"
    fam = {**(PROXIMAL if proximal else task.methods.get("fam", {})), **kappa_asked(options)}
    layers = tuple(options.layer or (("hidden",) if proximal else task.layers))
    return dataclasses.replace(task, layers=layers, methods={**task.methods, "fam": fam})


def combinations(task: Task, options: argparse.Namespace) -> Iterator[tuple[str, Settings]]:
    """Every optimizer with every value that was given: the run's label and its settings."""
    given = {name: getattr(options, name) for name in (*SWEPT, *CHOSEN) if getattr(options, name) is not None}
    kappa = {"layer": "+".join(options.layer)} if options.layer else {}
    kappa |= kappa_asked(options)
    used = set()
    for optimizer in options.optimizer:
        foreign = {*FAM_OPTIONS, *SAM_OPTIONS} - set(OPTIONS.get(optimizer, ()))
        own = {name: values for name, values in given.items() if name not in foreign}
        used |= set(own)
        lists = [values if isinstance(values, list) else [values] for values in own.values()]
        for values in itertools.product(*lists):
            changes = dict(zip(own, values, strict=True))
            named = {**changes, **kappa}.items()  # kappa is measured of every optimizer's run
            parts = [name if value is True else f"{name}={value}" for name, value in named]
            label = "-".join([optimizer, *parts])
            yield label, settings(task, optimizer, changes)
    if unused := set(given) - used:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in sorted(unused))
        raise ValueError(f"{names}: none of the chosen optimizers ({', '.join(options.optimizer)}) takes it")


def conditions(task: Task, options: argparse.Namespace, seed: int) -> Conditions:
    """The task's own where nothing else was asked."""
    epochs = options.epochs or (1 if options.smoke else task.epochs)
    source = Source(options.data, options.download, options.smoke)
    size = options.batch_size or task.batch_size
    return Conditions(seed, epochs, size, source, options.device, options.workers, options.keep)


def run(options: argparse.Namespace, console: Console) -> None:
    """Train every combination with every seed."""
    task = adapted(load_task(options.task), options)
    console.print(f"[bold]{task.name}[/]: {task.about}")
    if "paper" in task.about:
        console.print("Who states each setting: recipes/paper/settings.md", style="dim")
    folder = command.out(options) / task.name
    for (label, chosen), seed in itertools.product([*combinations(task, options)], options.seeds):
        path = folder / label / f"seed{seed}"
        asked = conditions(task, options, seed)
        if options.smoke and not options.resume:
            command.fresh(path)
        title = f"{label}, seed {seed}"
        train(task, chosen, asked, path, title=title, console=console, resume=options.resume)
    console.print(f"Tables and pictures: python -m recipes.report {folder}", soft_wrap=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run, and say in one sentence what is missing or wrong."""
    options = parse_arguments(arguments)
    try:
        run(options, make_console())
    except (Missing, FileExistsError, FileNotFoundError, ValueError) as error:
        sys.exit(f"{options.task}: {error}")
    except KeyboardInterrupt:
        sys.exit(f"{options.task}: stopped; the same command with --resume goes on after the last epoch")


if __name__ == "__main__":
    main()
