"""What an optimizer's step costs relative to the plain step of its base, measured before a run."""

import copy
import statistics
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from recipes.engine.optimizers import Settings, build, plain, take_step
from recipes.engine.task import Batch, Task


def relative_step_time(
    task: Task, settings: Settings, model: nn.Module, batches: Sequence[Batch], device: torch.device
) -> dict[str, Any]:
    """Median and quartiles, over the batches, of the ratio of the two steps on the same batch.

    The two alternate on copies of the model and change places at every batch, so that a busy machine slows
    both alike. The first batch is a warm-up and does not count.
    """
    if settings == plain(settings):
        return {"median": 1.0, "quartiles": [1.0, 1.0], "steps": 0}
    pair = []
    for chosen in (plain(settings), settings):
        twin = copy.deepcopy(model).train()
        pair.append((build(chosen, twin, twin.get_submodule(task.layer)), twin))
    ratios, milliseconds = [], []
    for number, (inputs, targets) in enumerate(batches):
        seconds = [0.0, 0.0]
        for which in (0, 1) if number % 2 else (1, 0):
            begin = clock(device)
            take_step(*pair[which], task.loss, inputs, targets)
            seconds[which] = clock(device) - begin
        if number:
            ratios.append(seconds[1] / seconds[0])
            milliseconds.append(1000 * seconds[0])
    return {
        "median": statistics.median(ratios),
        "quartiles": np.quantile(ratios, [0.25, 0.75]).tolist(),
        "steps": len(ratios),
        "plain_milliseconds": statistics.median(milliseconds),
    }


def clock(device: torch.device) -> float:
    """Seconds, after everything queued on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
