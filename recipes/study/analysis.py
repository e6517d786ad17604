"""From measured trials to statements: selection, paired differences, regrets, rank correlations."""

import statistics
from collections.abc import Iterable
from typing import Any

Results = list[dict[str, Any]]


def where(results: Iterable[dict[str, Any]], **fields: Any) -> Results:
    """The trials with these fields."""
    return [r for r in results if all(r[name] == value for name, value in fields.items())]


def choose(results: Results, task: str, method: str, noise: float) -> float:
    """The value with the best validation accuracy after the last epoch, mean over the tuning seeds."""
    tuned = where(results, task=task, method=method, noise=noise, tested=False)
    values: list[float] = sorted({r["value"] for r in tuned})
    if not values:
        raise ValueError(f"{method} was not tuned on {task} with noise {noise}: run the stages before")
    return max(values, key=lambda value: statistics.fmean(r["validation"] for r in where(tuned, value=value)))
