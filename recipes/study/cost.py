"""Measures what a step of each method costs relative to a step of SGD, on the study's networks."""

from collections.abc import Iterable, Iterator
from functools import partial
from itertools import cycle
from typing import Any

import torch

from recipes.engine.loop import Loop
from recipes.engine.task import Batch
from recipes.shared.timing import alternate, relative
from recipes.study.conditions import CONDITIONS, fits, trial
from recipes.study.methods import COMPARED, METHODS, OTHERS
from recipes.study.trial import loop_of

ROUNDS = 100
TIMED = [
    name for name in (*COMPARED, *OTHERS) if name not in ("SGD, no weight decay", "base", "FAM, last layer")
]


def relative_costs(tasks: Iterable[str], rounds: int = ROUNDS) -> dict[str, Any]:
    """Returns median and quartiles of each method's ratio to SGD, measured in turns on the same batches.

    One thread is used. The language model is left out, since its steps take seconds.
    """
    torch.set_num_threads(1)
    costs, conditions = {}, {condition.task: condition for condition in reversed(CONDITIONS)}

    def step(loop: Loop, remaining: Iterator[Batch]) -> None:
        loop.step(*next(remaining))

    for task in (task for task in tasks if task in conditions):
        starts = {name: (METHODS[name].start or (0.01,))[0] for name in TIMED if fits(name, task)}
        trials = {name: trial(conditions[task], name, value, 0, lr=0.01) for name, value in starts.items()}
        loops = {name: loop_of(one) for name, one in trials.items()}
        train = list(loops["SGD"].batches(1))
        calls = {name: partial(step, loop, cycle(train)) for name, loop in loops.items()}
        found = relative(alternate(calls, rounds, warm_up=2), "SGD")
        costs[task] = {"milliseconds": 1000 * found["SGD"]["seconds"], "methods": found}
        for own in found.values():
            del own["seconds"]
    return costs
