"""Times calls against each other: they take turns, so that a busy machine slows all of them alike."""

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import torch

from recipes.shared.results import CPU

Label = TypeVar("Label")


def timed(call: Callable[[], Any], device: torch.device = CPU) -> tuple[float, Any]:
    """Seconds of a call, everything that it queues on the device included, and its result."""
    begin = clock(device)
    result = call()
    return clock(device) - begin, result


def clock(device: torch.device) -> float:
    """Seconds, after everything queued on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def turns(
    calls: Mapping[Label, Callable[[], Any]],
    rounds: int,
    device: torch.device = CPU,
    *,
    warm_up: int = 1,
    every: Mapping[Label, int] | None = None,
) -> Iterator[tuple[Label, float, Any]]:
    """Label, seconds and result of every call; each round begins with another one.

    The first ``warm_up`` rounds are made, but not yielded. A call with an ``every`` of n sits out all but
    each n-th round: its seconds are nan then.
    """
    order = deque(calls)
    for number in range(-warm_up, rounds):
        for label in order:
            absent = every is not None and number % every.get(label, 1)
            seconds, result = (math.nan, None) if absent else timed(calls[label], device)
            if number >= 0:
                yield label, seconds, result
        order.rotate(-1)


def alternate(
    calls: Mapping[Label, Callable[[], Any]], rounds: int, device: torch.device = CPU, **options: Any
) -> dict[Label, list[float]]:
    """The seconds of every call by label, in the order of the rounds; ``options`` as for `turns`."""
    seconds: dict[Label, list[float]] = {label: [] for label in calls}
    for label, took, _ in turns(calls, rounds, device, **options):
        seconds[label].append(took)
    return seconds


def median(values: Sequence[float]) -> tuple[float, list[float]]:
    """The median, and the lower and the upper quartile; nan is left out."""
    low, middle, high = np.nanquantile(values, (0.25, 0.5, 0.75)).tolist()
    return middle, [low, high]


def ratio(own: Sequence[float], reference: Sequence[float]) -> tuple[float, list[float]]:
    """Median and quartiles of the quotients of seconds that belong to the same rounds."""
    return median([a / b for a, b in zip(own, reference, strict=True)])


def with_quartiles(middle: float, quartiles: Sequence[float]) -> str:
    """A cell of a table: a median, in brackets its quartiles."""
    low, high = quartiles
    return f"{middle:.2f} ({low:.2f}-{high:.2f})"
