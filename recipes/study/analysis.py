"""Turns measured trials into statements: selection, paired differences and p-values."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from operator import itemgetter
from typing import Any

from scipy.stats import ttest_1samp

from recipes.shared.results import grouped

Results = list[dict[str, Any]]


def where(results: Iterable[dict[str, Any]], **fields: Any) -> Results:
    """Returns the trials with these fields."""
    for name, value in fields.items():
        results = [r for r in results if r[name] == value]
    return [*results]


def values_of(results: Results, name: str) -> list[float]:
    """Returns one quantity of the trials, minus infinity where it was not finite."""
    return [-math.inf if r[name] is None else r[name] for r in results]


def mean_by(results: Results, *names: str, quantity: str = "validation") -> dict[Any, float]:
    """Returns the mean of a quantity over the seeds, by one field or by several."""
    groups = grouped(results, itemgetter(*names))
    return {key: statistics.fmean(values_of(found, quantity)) for key, found in sorted(groups.items())}


def best(scores: Mapping[Any, float]) -> Any:
    """Returns the key with the best score; among equally good ones, the middle one."""
    top = max(scores.values())
    keys = sorted(key for key, score in scores.items() if score == top)
    return keys[len(keys) // 2]


def to_try(values: Sequence[float], start: Sequence[float], scores: Mapping[float, float]) -> list[float]:
    """Returns the values of a grid that are to be tried, given the scores of those that were.

    At first these are the values in ``start``; then one beyond the best, while it is the first or last tried.
    """
    tried = sorted({*start, *scores})
    if not set(start) <= set(scores):
        return tried
    top = best(scores)
    position = values.index(top)
    below = values[max(0, position - 1) : position] if top == tried[0] else ()
    above = values[position + 1 : position + 2] if top == tried[-1] else ()
    return sorted({*tried, *below, *above})


def differences(ours: Results, theirs: Results, name: str) -> list[float]:
    """Returns the paired differences of a quantity, for the seeds that both have."""
    pairs = {r["seed"]: value for r, value in zip(theirs, values_of(theirs, name), strict=True)}
    own = zip(ours, values_of(ours, name), strict=True)
    return [value - pairs[r["seed"]] for r, value in own if r["seed"] in pairs]


def with_interval(values: Sequence[float]) -> tuple[float, float]:
    """Returns the mean, and half the width of Student's 95 % interval."""
    interval = ttest_1samp(values, 0).confidence_interval()
    return statistics.fmean(values), (interval.high - interval.low) / 2


def p_value(values: Sequence[float]) -> float:
    """Returns the p-value of Student's test that the mean is 0."""
    return float(ttest_1samp(values, 0).pvalue) if len(set(values)) > 1 else 1.0


def holm(p_values: Mapping[Any, float]) -> dict[Any, float]:
    """Returns the p-values corrected for their number (Holm, 1979)."""
    corrected, largest = {}, 0.0
    for rank, (key, p) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p))
        corrected[key] = largest
    return corrected
