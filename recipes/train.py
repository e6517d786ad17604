"""Train a task with one optimizer or several, with one seed or several.

    python -m recipes.train cifar10 --optimizer sgd sam fam --seeds 0 1 2     # the paper's settings
    python -m recipes.train skulls --optimizer fam --lam 0 0.0006 0.002 0.02 0.1 0.7
    python -m recipes.train cifar10 --optimizer fam --resume                  # go on after a stop
    python -m recipes.train cifar10 --optimizer fam --measure-only            # kappa of what was trained
    python -m recipes.train cifar10 --smoke                                   # does everything run?

Each combination is a run with a folder of its own, such as runs/cifar10/fam-lam=0.1/seed0, which
``recipes.report`` turns into tables and pictures. Options not given are the task's: the paper's settings.
"""

import argparse
import itertools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from recipes.engine.measure import measure, table
from recipes.engine.optimizers import FAM_OPTIONS, OPTIMIZERS, OPTIONS, SAM_OPTIONS, Settings, settings
from recipes.engine.progress import progress_bar
from recipes.engine.task import Missing, Source, Task
from recipes.engine.training import Conditions, train
from recipes.tasks import TASKS, load_task

SWEPT = ("lr", "weight_decay", "lam", "rho")  # these take several values, each a run of its own
CHOSEN = tuple(name for name in FAM_OPTIONS if name not in SWEPT)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m recipes.train", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--optimizer", nargs="+", choices=OPTIMIZERS, default=["fam"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of weights, order, splits, noise")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--batch-size", type=int)
    for name in SWEPT:
        parser.add_argument(f"--{name.replace('_', '-')}", type=float, nargs="+", metavar=name.upper())
    parser.add_argument("--measure", choices=("neuronwise", "layerwise"))
    parser.add_argument("--mode", choices=("exact", "hutchinson", "full"))
    parser.add_argument("--n-samples", type=int, help="Hutchinson's probes")
    parser.add_argument("--normalize", action=argparse.BooleanOptionalAction, help="divide kappa by m")
    parser.add_argument(
        "--detach-hessian", action=argparse.BooleanOptionalAction, help="as the released code"
    )
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder of the data sets")
    parser.add_argument("--download", action="store_true", help="fetch (or generate) data that are missing")
    parser.add_argument("--workers", type=int, default=0, help="processes that load the samples")
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", type=torch.device, default=torch.device(default_device))
    parser.add_argument("--out", type=Path, default=Path("runs"))
    parser.add_argument("--resume", action="store_true", help="go on with the runs that were begun")
    parser.add_argument("--measure-only", action="store_true", help="measure the runs' checkpoints")
    parser.add_argument("--float64", action="store_true", help="with --measure-only: in double precision")
    parser.add_argument("--smoke", action="store_true", help="one epoch of a few samples: a test, no result")
    return parser.parse_args(arguments)


def combinations(task: Task, options: argparse.Namespace) -> Iterator[tuple[str, Settings]]:
    """Every optimizer with every value that was given: the run's label and its settings."""
    given = {name: getattr(options, name) for name in (*SWEPT, *CHOSEN) if getattr(options, name) is not None}
    used = set()
    for optimizer in options.optimizer:
        foreign = {*FAM_OPTIONS, *SAM_OPTIONS} - set(OPTIONS.get(optimizer, ()))
        own = {name: values for name, values in given.items() if name not in foreign}
        used |= set(own)
        lists = [values if isinstance(values, list) else [values] for values in own.values()]
        for values in itertools.product(*lists):
            changes = dict(zip(own, values, strict=True))
            parts = [name if value is True else f"{name}={value}" for name, value in changes.items()]
            label = "-".join([optimizer, *parts])
            yield label, settings(task, optimizer, changes)
    if unused := set(given) - used:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in sorted(unused))
        raise ValueError(f"{names}: none of the chosen optimizers ({', '.join(options.optimizer)}) takes it")


def conditions(task: Task, options: argparse.Namespace, seed: int) -> Conditions:
    """The task's own where nothing else was asked."""
    epochs = options.epochs or (1 if options.smoke else task.epochs)
    source = Source(options.data, options.download, options.smoke)
    return Conditions(
        seed, epochs, options.batch_size or task.batch_size, source, options.device, options.workers
    )


def run(options: argparse.Namespace, console: Console) -> None:
    """Train, or measure, every combination with every seed."""
    task = load_task(options.task)
    console.print(f"[bold]{task.name}[/]: {task.about}")
    if task.differences:
        console.print(f"Paper and released code differ: {task.differences}")
    measured: dict[str, dict[str, Any]] = {}
    for (label, chosen), seed in itertools.product(list(combinations(task, options)), options.seeds):
        path = options.out / task.name / label / f"seed{seed}"
        asked = conditions(task, options, seed)
        if options.measure_only:
            measured[f"{label}, seed {seed}"] = measure(task, asked, path, double=options.float64)
            continue
        with progress_bar(f"{label}, seed {seed}", task, console) as show:
            train(task, chosen, asked, path, resume=options.resume, on_progress=show)
    if measured:
        console.print(table(measured))
    else:
        console.print(f"Tables and pictures: python -m recipes.report {options.out / task.name}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run, and say in one sentence what is missing or wrong."""
    options = parse_arguments(arguments)
    try:
        run(options, Console())
    except (Missing, FileExistsError, FileNotFoundError, ValueError) as error:
        sys.exit(f"{options.task}: {error}")
    except KeyboardInterrupt:
        sys.exit(f"{options.task}: stopped; the same command with --resume goes on after the last epoch")


if __name__ == "__main__":
    main()
