"""Measures training steps against the plain one: time in turns, peak memory, and counted operations."""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from recipes.benchmark.candidates import REFUSALS, Candidate, Step
from recipes.benchmark.memory import alive_bytes, peak_bytes
from recipes.shared import timing
from recipes.shared.problem import Problem

LEAST, MOST = 5, 400  # rounds, however long they take
Result = dict[str, Any]


def prepared(
    problem: Problem,
    candidates: Mapping[str, Candidate],
    device: torch.device,
    *,
    before: Callable[[nn.Module], Any] = lambda model: None,
    counted: bool = True,
    weighed: bool = True,
) -> tuple[dict[str, Step], dict[str, Result]]:
    """Returns the candidates' warmed-up steps on copies of the problem, with peak memory and operations.

    ``before`` is called with every copy of the model. A candidate that refuses the problem has no step, and
    the refusal is its result.
    """
    steps: dict[str, Step] = {}
    results: dict[str, Result] = {}
    for label, candidate in candidates.items():
        others = alive_bytes(device)
        twin = copy.deepcopy(problem)
        try:
            step = candidate.build(twin)
            before(twin.model)
            period = timing.repeated(step, candidate.period)
            period()
            results[label] = {}
            if weighed:  # step by step: the profile of a step is large
                peaks = [peak_bytes(step, device) for _ in range(candidate.period)]
                results[label]["peak_bytes"] = max(peaks) - others
            if counted:
                results[label]["operations"] = flops(period) / candidate.period
        except REFUSALS as error:  # a refusal is a result too
            results[label] = {"refused": str(error)}
        else:
            steps[label] = step
    plain = results["plain"]
    for name, of in (("memory", "peak_bytes"), ("count", "operations")):
        for own in (own for own in results.values() if of in own):
            own[name] = own[of] / plain[of]
    return steps, results


def timings(
    steps: Mapping[str, Step], candidates: Mapping[str, Candidate], seconds: float, device: torch.device
) -> dict[str, Result]:
    """Returns median and quartiles of the ratios to the plain step of the same round, in about ``seconds``.

    In a round every candidate takes equally many steps in a row, a multiple of its period, so that its costly
    steps count with their share.
    """
    size = math.lcm(*(candidates[label].period for label in steps))
    blocks = {label: timing.repeated(step, size) for label, step in steps.items()}
    once = sum(timing.timed(block, device)[0] for block in blocks.values())
    rounds = max(LEAST, min(MOST, int(seconds / once)))
    found = timing.relative(timing.alternate(blocks, rounds, device, warm_up=0), "plain")
    for own in found.values():
        own |= {"rounds": rounds, "seconds": own["seconds"] / size}
    return found


def flops(call: Callable[[], Any]) -> int:
    """Returns the operations of matrix products and convolutions in a call: two per multiplication."""

    def addmm_(total: Sequence[int], a: Sequence[int], b: Sequence[int], **rest: Any) -> int:
        return 2 * a[0] * a[1] * b[1]  # torch's table leaves it out

    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: addmm_})
    # The counter's own tracker sets global hooks; FAM would have to find out whether they change an output.
    nothing = {"__enter__": lambda: None, "__exit__": lambda *error: None}
    counter.mod_tracker = SimpleNamespace(parents={"Global"}, **nothing)  # type: ignore[assignment]
    with counter as counted:
        call()
    total: int = counted.get_total_flops()
    return total
