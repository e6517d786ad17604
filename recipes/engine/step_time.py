"""What an optimizer's step costs relative to the plain step of its base, measured before a run."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from recipes.engine.layers import select
from recipes.engine.optimizers import Settings, build, plain, take_step
from recipes.engine.task import Batch, Task
from recipes.shared.timing import alternate, median, ratio


def relative_step_time(
    task: Task, settings: Settings, model: nn.Module, batches: Sequence[Batch], device: torch.device
) -> dict[str, Any]:
    """Median and quartiles, over the batches, of the ratio of the two steps on the same batch.

    The two alternate on copies of the model. The first batch is a warm-up and does not count.
    """
    if settings == plain(settings):
        return {"median": 1.0, "quartiles": [1.0, 1.0], "steps": 0}

    def stepping(chosen: Settings) -> Callable[[], Tensor]:
        twin = copy.deepcopy(model).train()
        optimizer, remaining = build(chosen, twin, select(twin, task.layers)), iter(batches)
        return lambda: take_step(optimizer, twin, task.loss, *next(remaining))

    calls = {"plain": stepping(plain(settings)), "own": stepping(settings)}
    seconds = alternate(calls, len(batches) - 1, device)
    middle, quartiles = ratio(seconds["own"], seconds["plain"])
    milliseconds = 1000 * median(seconds["plain"])[0]
    return {
        "median": middle,
        "quartiles": quartiles,
        "steps": len(batches) - 1,
        "plain_milliseconds": milliseconds,
    }
