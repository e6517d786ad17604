"""From measured trials to statements: selection, paired differences, defaults, rank correlations."""

import math
import statistics
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from scipy.stats import kendalltau, ttest_1samp

Results = list[dict[str, Any]]
Quantity = Callable[[dict[str, Any]], float]
MEASURES: dict[str, Quantity] = {  # of flatness and size -> how it follows from what was measured
    "kappa": lambda r: r["kappa"],
    "layerwise kappa": lambda r: r["kappa_layerwise"],
    "Tr(H)": lambda r: r["trace"],
    "squared norm of W": lambda r: r["weight_norm"] ** 2,
}
GAPS: dict[str, Quantity] = {
    "accuracy": lambda r: r["train_accuracy"] - r["test_accuracy"],
    "loss": lambda r: r["test_nll"] - r["train_nll"],
}


def where(results: Iterable[dict[str, Any]], **fields: Any) -> Results:
    """The trials with these fields."""
    return [r for r in results if all(r[name] == value for name, value in fields.items())]


def values_of(results: Results, name: str) -> list[float]:
    """One quantity of the trials; nan where it was not finite."""
    return [math.nan if r[name] is None else r[name] for r in results]


def mean_by_value(results: Results, name: str) -> dict[float, float]:
    """Mean over the seeds of a quantity, by the method's value."""
    grid = sorted({r["value"] for r in results})
    return {value: statistics.fmean(values_of(where(results, value=value), name)) for value in grid}


def choose(
    results: Results, task: str, method: str, noise: float, grid: Collection[float] | None = None
) -> float:
    """The value with the best validation accuracy after the last epoch, mean over the tuning seeds.

    Of the values in ``grid``, or of all that were tried.
    """
    tuned = where(results, task=task, method=method, noise=noise, tested=False)
    tuned = [r for r in tuned if grid is None or r["value"] in grid]
    if not tuned:
        raise ValueError(f"{method} was not tuned on {task} with noise {noise}: run the stages before")
    by_value = mean_by_value(tuned, "validation")
    return max(by_value, key=by_value.__getitem__)


def difference(ours: Results, theirs: Results, name: str) -> tuple[float, float]:
    """Mean of the differences paired by seed, and half the width of Student's 95 % interval."""
    return with_interval(list(differences(ours, theirs, name).values()))


def differences(ours: Results, theirs: Results, name: str) -> dict[int, float]:
    """Of each seed."""
    pairs = {r["seed"]: r[name] for r in theirs}
    return {r["seed"]: r[name] - pairs[r["seed"]] for r in ours if r["seed"] in pairs}


def mean_difference(
    ours: Results, theirs: Results, name: str, settings: Sequence[Mapping[str, Any]]
) -> tuple[float, float]:
    """The same, of the mean over several settings: one number per seed."""
    columns = [differences(where(ours, **fields), where(theirs, **fields), name) for fields in settings]
    seeds = sorted(set.intersection(*(set(column) for column in columns)))
    return with_interval([statistics.fmean(column[seed] for column in columns) for seed in seeds])


def with_interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half the width of Student's 95 % interval."""
    interval = ttest_1samp(values, 0).confidence_interval()
    return statistics.fmean(values), (interval.high - interval.low) / 2


def best_default(
    ways: Mapping[str, Sequence[Mapping[float, float]]],
) -> dict[str, tuple[float, list[float], list[float]]]:
    """For each way to weigh kappa the single value that loses least, and what it loses in every condition.

    Args:
        ways: by name, a condition's accuracy by value, one mapping per condition, in one order for all.

    Returns:
        By way: the default; its losses against the best value of any way; and of its own.
    """
    optima = [
        max(max(by_value.values()) for by_value in column) for column in zip(*ways.values(), strict=True)
    ]
    found = {}
    for way, by_condition in ways.items():
        shared = set.intersection(*(set(by_value) for by_value in by_condition))
        default = max(sorted(shared), key=lambda value: sum(by_value[value] for by_value in by_condition))
        own = [max(by_value.values()) - by_value[default] for by_value in by_condition]
        all_ = [best - by_value[default] for best, by_value in zip(optima, by_condition, strict=True)]
        found[way] = (default, all_, own)
    return found


def rank_correlation(results: Results, measure: str, gap: str) -> tuple[float, float]:
    """Kendall's tau between a measure and the generalisation gap, and its p-value."""
    known = [r for r in results if None not in (r["train_nll"], r["test_nll"], r["kappa"])]
    of_measure, of_gap = MEASURES[measure], GAPS[gap]
    tau = kendalltau(*zip(*((of_measure(r), of_gap(r)) for r in known), strict=True))
    return float(tau.statistic), float(tau.pvalue)
