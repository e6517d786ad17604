"""What a step of each method costs relative to a step of SGD, on every network of the study."""

from collections.abc import Callable, Iterable
from itertools import cycle
from typing import Any

import torch

from recipes.shared.timing import alternate, median, ratio
from recipes.study.conditions import CONDITIONS, trial
from recipes.study.methods import METHODS
from recipes.study.tasks import TASKS, samples
from recipes.study.trial import Stepper, batches

ROUNDS = 100
TIMED = (
    "SGD",
    "label smoothing",
    "dropout",
    "noise, hidden layers",
    "SAM",
    "ASAM",
    "LookSAM, k = 5",
    "LookSAM, k = 10",
    "control, T = I",
    "FAM, last layer, detached",
    "FAM, hidden, detached",
    "FAM, hidden",
    "FAM, proximal",
)


def relative_costs(tasks: Iterable[str], rounds: int = ROUNDS) -> dict[str, Any]:
    """Median and quartiles of the ratio, all methods in alternation on the same batches, one thread."""
    torch.set_num_threads(1)
    return {task: relative_cost(task, rounds) for task in tasks}


def relative_cost(task: str, rounds: int) -> dict[str, Any]:
    """Of one task's network."""
    condition = next(c for c in CONDITIONS if c.task == task)
    classes = TASKS[task].predicts == "classes"  # labels can be smoothed, numbers cannot
    timed = [name for name in TIMED if classes or METHODS[name].kind != "smoothing"]
    trials = {name: trial(condition, name, (METHODS[name].start or (0.01,))[0], 0, lr=0.01) for name in timed}
    steppers = {name: Stepper(one) for name, one in trials.items()}
    train = list(batches(trials["SGD"], samples(task, condition.noise, 0).train, 1))

    def stepping(stepper: Stepper) -> Callable[[], None]:
        remaining = cycle(train)
        return lambda: stepper.step(*next(remaining))

    calls = {name: stepping(stepper) for name, stepper in steppers.items()}
    seconds = alternate(calls, rounds, warm_up=2)
    found: dict[str, Any] = {"milliseconds": 1000 * median(seconds["SGD"])[0], "methods": {}}
    for name, own in seconds.items():
        middle, quartiles = ratio(own, seconds["SGD"])
        found["methods"][name] = {"ratio": middle, "quartiles": quartiles}
    return found
