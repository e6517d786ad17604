"""Times calls against each other: they take turns, so that a busy machine slows all of them alike."""

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import torch

from recipes.shared.results import CPU

Label = TypeVar("Label")


def timed(call: Callable[[], Any], device: torch.device = CPU) -> tuple[float, Any]:
    """Returns the seconds of a call, with everything that it queues on the device, and its result."""
    begin = clock(device)
    result = call()
    return clock(device) - begin, result


def clock(device: torch.device) -> float:
    """Returns the time in seconds, after everything queued on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def repeated(call: Callable[[], Any], times: int) -> Callable[[], None]:
    """Returns a function that makes the call so many times."""

    def several() -> None:
        for _ in range(times):
            call()

    return several


def turns(
    calls: Mapping[Label, Callable[[], Any]], rounds: int, device: torch.device = CPU, warm_up: int = 1
) -> Iterator[tuple[Label, float, Any]]:
    """Yields label, seconds and result of every call, round by round.

    Each round begins with another call. The first ``warm_up`` rounds are made, but not yielded.
    """
    order = deque(calls)
    for number in range(-warm_up, rounds):
        for label in order:
            seconds, result = timed(calls[label], device)
            if number >= 0:
                yield label, seconds, result
        order.rotate(-1)


def alternate(
    calls: Mapping[Label, Callable[[], Any]], rounds: int, device: torch.device = CPU, warm_up: int = 1
) -> dict[Label, list[float]]:
    """Returns the seconds of every call by label, in the order of the rounds."""
    seconds: dict[Label, list[float]] = {label: [] for label in calls}
    for label, took, _ in turns(calls, rounds, device, warm_up):
        seconds[label].append(took)
    return seconds


def relative(seconds: Mapping[Label, Sequence[float]], reference: Label) -> dict[Label, dict[str, Any]]:
    """Returns each call's median seconds, and median and quartiles of its ratio to the reference by round."""
    found = {}
    for label, own in seconds.items():
        middle, quartiles = median([a / b for a, b in zip(own, seconds[reference], strict=True)])
        found[label] = {"ratio": middle, "quartiles": quartiles, "seconds": median(own)[0]}
    return found


def median(values: Sequence[float]) -> tuple[float, list[float]]:
    """Returns the median, and the lower and the upper quartile."""
    low, middle, high = np.quantile(values, (0.25, 0.5, 0.75)).tolist()
    return middle, [low, high]


def with_quartiles(middle: float, quartiles: Sequence[float]) -> str:
    """Returns a table's cell: a median, with its quartiles in brackets."""
    low, high = quartiles
    return f"{middle:.2f} ({low:.2f}-{high:.2f})"
