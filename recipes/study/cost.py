"""What a step of each method costs relative to the plain step, on the study's network."""

from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import Any

import torch

from recipes.shared.timing import alternate, median, ratio
from recipes.study.methods import METHODS
from recipes.study.protocol import LR, SHORTLIST, trial
from recipes.study.samples import samples
from recipes.study.trial import Stepper, epoch_batches


def relative_costs(task: str, folder: Path, rounds: int) -> dict[str, Any]:
    """Median and quartiles of the ratio, all methods in alternation on the same batches, one thread."""
    torch.set_num_threads(1)
    steppers = {name: Stepper(trial(task, name, METHODS[name].grid[0], 0.4, 0, LR)) for name in SHORTLIST}
    train = samples(task, 0.4, 0, folder).train
    batches = list(epoch_batches(steppers["plain"].trial, train, 1))

    def stepping(stepper: Stepper) -> Callable[[], None]:
        remaining = cycle(batches)
        return lambda: stepper.step(*next(remaining))

    seconds = alternate({name: stepping(stepper) for name, stepper in steppers.items()}, rounds)
    costs = {}
    for name, own in seconds.items():
        middle, quartiles = ratio(own, seconds["plain"])
        costs[name] = {"ratio": middle, "quartiles": quartiles}
    milliseconds = 1000 * median(seconds["plain"])[0]
    return {"task": task, "rounds": rounds, "plain_milliseconds": milliseconds, "methods": costs}
