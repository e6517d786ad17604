"""Checks the exact kappa against the mean of its random estimates, before anything is timed."""

import copy
import math
import statistics
from collections.abc import Iterable
from typing import Any

import torch

from recipes.benchmark.candidates import REFUSALS, Candidate
from recipes.shared.problem import Problem

TOLERANCE = 1e-4  # relative, in float32


def check(problem: Problem, candidates: Iterable[Candidate], probes: int) -> dict[str, Any]:
    """Returns, for each curvature of a penalty, kappa with the mean and standard error of its estimates.

    Gauss-Newton is checked on four samples: if samples interact, its exact mode takes a product per output.
    """
    penalties = [c.settings for c in candidates if c.settings.get("mode", "exact") != "proximal"]
    used = dict.fromkeys(s.get("curvature", "hessian") for s in penalties if s["optimizer"] == "fam")
    result: dict[str, Any] = {}
    for curvature in used:
        part = problem if curvature == "hessian" else problem.part(4)
        twins = copy.deepcopy(part), copy.deepcopy(part)  # a forward changes batch statistics
        try:
            (exact,) = seeded(twins[0], curvature=curvature)
            values = seeded(twins[1], times=probes, curvature=curvature, mode="hutchinson")
        except REFUSALS as error:
            result[curvature] = {"refused": str(error)}
            continue
        result[curvature] = {"exact": exact, **agreement(exact, values, f"{curvature} curvature")}
    return result


def seeded(problem: Problem, **options: Any) -> list[float]:
    """Returns the library's kappas; dropout is seeded, so that the forward is always the same."""
    torch.manual_seed(0)
    return [kappa.item() for kappa in problem.penalised(**options)[1:]]


def agreement(exact: float, values: list[float], name: str) -> dict[str, float]:
    """Returns mean and standard error of the values. Raises AssertionError unless they fit the exact one."""
    mean = statistics.fmean(values)
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    if not abs(mean - exact) <= 5 * error + TOLERANCE * abs(exact):
        raise AssertionError(f"{name}: expected {exact}, got {mean} +- {error}")
    return {"mean": mean, "standard_error": error}
