"""What a step of each method costs relative to a step of SGD, on every network of the study."""

import statistics
from collections.abc import Iterable
from typing import Any

import torch

from recipes.engine.step_time import clock
from recipes.shared.results import CPU
from recipes.study.methods import METHODS
from recipes.study.protocol import CONDITIONS, trial
from recipes.study.tasks import samples
from recipes.study.trial import Stepper, batches

ROUNDS = 100
TIMED = (
    "SGD",
    "dropout",
    "noise, hidden layers",
    "SAM",
    "FAM, last layer, detached",
    "FAM, last but one, detached",
    "FAM, last but one",
    "FAM, hidden, detached",
    "FAM, hidden",
    "FAM, all",
)


def relative_costs(tasks: Iterable[str], rounds: int = ROUNDS) -> dict[str, Any]:
    """Median and quartiles of the ratio, all methods in alternation on the same batches, one thread."""
    torch.set_num_threads(1)
    return {task: relative_cost(task, rounds) for task in tasks}


def relative_cost(task: str, rounds: int) -> dict[str, Any]:
    """Of one task's network."""
    condition = next(c for c in CONDITIONS if c.task == task)
    trials = {name: trial(condition, name, (METHODS[name].start or (0.01,))[0], 0, lr=0.01) for name in TIMED}
    steppers = {name: Stepper(one) for name, one in trials.items()}
    train = list(batches(trials["SGD"], samples(task, condition.noise, 0).train, 1))
    seconds: dict[str, list[float]] = {name: [] for name in TIMED}
    for turn in range(rounds + 2):
        first = turn % len(TIMED)
        for name in TIMED[first:] + TIMED[:first]:
            begin = clock(CPU)
            steppers[name].step(*train[turn % len(train)])
            if turn > 1:  # the first two warm up
                seconds[name].append(clock(CPU) - begin)
    found: dict[str, Any] = {"milliseconds": 1000 * statistics.median(seconds["SGD"]), "methods": {}}
    for name in TIMED:
        ratios = [own / plain for own, plain in zip(seconds[name], seconds["SGD"], strict=True)]
        lower, median, upper = statistics.quantiles(ratios, n=4)
        found["methods"][name] = {"ratio": median, "quartiles": [lower, upper]}
    return found
