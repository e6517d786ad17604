"""Trains a task (a network on a data set) with one or several optimizers and seeds.

    python -m recipes.train quickstart --optimizer sgd fam --mode proximal    # FAM as recommended
    python -m recipes.train cifar10 --download --optimizer sgd sam fam --seeds 0 1 2    # the paper's settings
    python -m recipes.train skulls --optimizer fam --lam 0 0.0006 0.002 0.02 0.1 0.7

Each combination is a run with its own folder, such as runs/cifar10/fam-lam=0.1/seed0. An option that is not
given has the task's value (in the paper's tasks, the paper's). With --mode proximal, FAM has its own values.
"""

import dataclasses
import itertools
from argparse import BooleanOptionalAction
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from recipes.engine import optimizers
from recipes.engine.loop import Conditions
from recipes.engine.optimizers import MEASURING, Settings
from recipes.engine.task import Source, Task
from recipes.engine.training import train
from recipes.shared import command
from recipes.shared.command import SEVERAL, Options
from recipes.shared.tables import console as make_console
from recipes.tasks import TASKS, load_task

SWEPT = {  # these take several values; each is a run of its own
    "lr": "learning rates",
    "weight_decay": "weight decays",
    "lam": "FAM's strengths",
    "rho": "SAM's radii",
}
CHOSEN = ("every", "normalize", "detach_hessian")  # these take one value, and only FAM has them
OPTIONS: dict[str, dict[str, Any]] = {
    "--optimizer": {
        **SEVERAL,
        "choices": optimizers.OPTIMIZERS,
        "default": ["fam"],
        "metavar": "NAME",
        "help": f"{', '.join(optimizers.OPTIMIZERS)} (default: fam)",
    },
    "--epochs": {"type": command.positive, "help": "in place of the task's"},
    "--batch-size": {"type": command.positive, "help": "in place of the task's"},
    **{
        f"--{name.replace('_', '-')}": {**SEVERAL, "type": command.number, "help": f"{what}; a run for each"}
        for name, what in SWEPT.items()
    },
    "--layer": {
        "nargs": "+",
        "metavar": "NAME",
        "help": "modules that are kept flat, or: all, hidden, last, 'last but one', first",
    },
    "--curvature": {"choices": ("hessian", "gauss_newton"), "help": "of the penalty"},
    "--measure": {"choices": ("neuronwise", "layerwise"), "help": "of the penalty"},
    "--mode": {
        "choices": ("exact", "hutchinson", "full", "proximal"),
        "help": "proximal: FAM as recommended; the others: the paper's penalty",
    },
    "--every": {"type": command.positive, "help": "steps from one proximal step to the next"},
    "--n-samples": {"type": command.positive, "help": "random vectors in an estimate of kappa"},
    "--normalize": {"action": BooleanOptionalAction, "help": "divide kappa by a layer's number of inputs"},
    "--detach-hessian": {"action": BooleanOptionalAction, "help": "hold the penalty's Hessian constant"},
    "--download": {"action": "store_true", "help": "fetch or generate data that are missing"},
    "--workers": {"type": int, "default": 0, "help": "processes that load the samples (default: 0)"},
    "--resume": {"action": "store_true", "help": "go on with runs that were stopped"},
    "--keep": {"type": command.positive, "metavar": "N", "help": "save the network every N epochs"},
}


def parse_arguments(arguments: Sequence[str] | None = None) -> Options:
    """Reads the command line."""
    common, tasks = ("--seeds", "--device", "--data"), {name: task.about for name, task in TASKS.items()}
    smoke = "one epoch of a few samples"
    parser = command.parser("train", __doc__, *common, out=Path("runs"), smoke=smoke, listed=tasks)
    parser.add_argument("task", choices=TASKS, metavar="task", help="one of those below")
    for name, settings in OPTIONS.items():
        parser.add_argument(name, **settings)
    return parser.parse_args(arguments)


def kappa_asked(options: Options) -> dict[str, Any]:
    """Returns the options of kappa that were given, for the penalty and for what is measured alike."""
    return {name: getattr(options, name) for name in MEASURING if getattr(options, name) is not None}


def adapted(task: Task, options: Options) -> Task:
    """Returns the task with the layers and the kappa that were asked for."""
    proximal = options.mode == "proximal"
    fam = {**(optimizers.PROXIMAL if proximal else task.methods.get("fam", {})), **kappa_asked(options)}
    layers = tuple(options.layer or (("hidden",) if proximal else task.layers))
    return dataclasses.replace(task, layers=layers, methods={**task.methods, "fam": fam})


def combinations(task: Task, options: Options) -> Iterator[tuple[str, Settings]]:
    """Yields the run's label and settings for every optimizer with every value that was given."""
    given = {name: getattr(options, name) for name in (*SWEPT, *CHOSEN) if getattr(options, name) is not None}
    kappa = {"layer": "+".join(options.layer)} if options.layer else {}
    kappa |= kappa_asked(options)
    used = set()
    for optimizer in options.optimizer:
        own_options = optimizers.OPTIONS.get(optimizer, ())
        foreign = {*optimizers.FAM_OPTIONS, *optimizers.SAM_OPTIONS}.difference(own_options)
        own = {name: values for name, values in given.items() if name not in foreign}
        used |= set(own)
        lists = [values if isinstance(values, list) else [values] for values in own.values()]
        for values in itertools.product(*lists):
            changes = dict(zip(own, values, strict=True))
            named = {**changes, **kappa}.items()  # kappa is measured in every optimizer's run
            parts = [name if value is True else f"{name}={value}" for name, value in named]
            label = "-".join([optimizer, *parts])
            yield label, optimizers.settings(task, optimizer, changes)
    if unused := set(given) - used:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in sorted(unused))
        raise ValueError(f"{names}: none of the chosen optimizers ({', '.join(options.optimizer)}) takes it")


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains every combination with every seed."""
    options, console = parse_arguments(arguments), make_console()
    with command.in_a_sentence(options.task, "stopped; the same command with --resume goes on from there"):
        task = adapted(load_task(options.task), options)
        console.print(f"[bold]{task.name}[/]: {task.about}")
        if "paper" in task.about:
            console.print("Who states each setting: recipes/paper/settings.md", style="dim")
        folder = command.out(options) / task.name
        epochs = options.epochs or (1 if options.smoke else task.epochs)
        source = Source(options.data, options.download, options.smoke)
        size = options.batch_size or task.batch_size
        asked = epochs, size, source, options.device, options.workers, options.keep
        for (label, chosen), seed in itertools.product([*combinations(task, options)], options.seeds):
            path = folder / label / f"seed{seed}"
            if options.smoke and not options.resume:
                command.fresh(path)
            title, resume = f"{label}, seed {seed}", options.resume
            train(task, chosen, Conditions(seed, *asked), path, title=title, console=console, resume=resume)
        console.print(f"Tables and pictures: python -m recipes.report {folder}", soft_wrap=True)


if __name__ == "__main__":
    main()
