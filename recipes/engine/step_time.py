"""Measures, before a run, the time of an optimizer's step relative to the plain step of its base."""

import copy
from collections.abc import Callable, Sequence
from itertools import cycle
from typing import Any

from recipes.engine.layers import select
from recipes.engine.loop import Loop
from recipes.engine.optimizers import Settings, build, plain, take_step
from recipes.engine.task import Batch
from recipes.shared.timing import alternate, relative, repeated

STEPS, BLOCKS = 10, 3  # timed steps if all cost the same; timed blocks if some cost more


def relative_step_time(loop: Loop, settings: Settings, batches: Sequence[Batch]) -> dict[str, Any]:
    """Returns median and quartiles of the step's time over the plain step's, measured on copies of the model.

    The two take turns on the same batches. If every k-th step costs more, blocks of k steps are timed.
    """
    if settings == plain(settings):
        return {"median": 1.0, "quartiles": [1.0, 1.0], "steps": 0}
    size: int = settings.get("every") or settings.get("k") or 1

    def block(chosen: Settings) -> Callable[[], None]:
        twin = copy.deepcopy(loop.model).train()
        optimizer, remaining = build(chosen, twin, select(twin, loop.task.layers)), cycle(batches)
        return repeated(lambda: take_step(optimizer, twin, loop.task.loss, *next(remaining)), size)

    rounds = 1 if loop.conditions.source.smoke else STEPS if size == 1 else BLOCKS
    calls = {"plain": block(plain(settings)), "own": block(settings)}
    found = relative(alternate(calls, rounds, loop.conditions.device), "plain")
    own = {"median": found["own"]["ratio"], "quartiles": found["own"]["quartiles"], "steps": rounds * size}
    return {**own, "plain_milliseconds": 1000 * found["plain"]["seconds"] / size}
