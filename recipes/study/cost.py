"""What a step of each method costs relative to the plain step, on the study's network."""

import statistics
from pathlib import Path
from typing import Any

import torch

from recipes.engine.step_time import clock
from recipes.shared.results import CPU
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
    seconds: dict[str, list[float]] = {name: [] for name in steppers}
    names = list(steppers)
    for turn in range(rounds + 1):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            begin = clock(CPU)
            steppers[name].step(*batches[turn % len(batches)])
            if turn:  # the first warms up
                seconds[name].append(clock(CPU) - begin)
    costs = {}
    for name in names:
        ratios = sorted(own / plain for own, plain in zip(seconds[name], seconds["plain"], strict=True))
        quartiles = [ratios[rounds // 4], ratios[-1 - rounds // 4]]
        costs[name] = {"ratio": statistics.median(ratios), "quartiles": quartiles}
    milliseconds = 1000 * statistics.median(seconds["plain"])
    return {"task": task, "rounds": rounds, "plain_milliseconds": milliseconds, "methods": costs}
