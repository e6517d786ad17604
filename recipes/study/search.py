"""Lists the trials of the joint search for learning rate, weight decay and each method's own value.

The settings with the best validation score after the last epoch are chosen, averaged over two seeds that are
not used again. Validation labels are as noisy as the training labels. Of these stages only "comparison",
"more_seeds" and "longer" look at test data, once per network, after everything was chosen.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import product
from operator import itemgetter
from typing import Any

from recipes.study import conditions
from recipes.study.analysis import Results, best, mean_by, to_try, where
from recipes.study.conditions import CONDITIONS, SEEDS, TUNING_SEEDS, Condition, trial
from recipes.study.methods import COMPARED, LEARNING_RATES, METHODS, WEIGHT_DECAYS
from recipes.study.trial import Trial, missing

Setting = tuple[float, float, float]  # learning rate, weight decay, the method's own value
SETTINGS = ("lr", "weight_decay", "value")
RATES, DECAYS = (0.0125, 0.05, 0.2), (5e-4, 2e-3, 8e-3)  # SGD's values that are tried first
SGD_ALONE = (("fashion", 0.0), ("fashion-resnet", 0.4), ("fashion-resnet", 0.0))  # only SGD is searched
SHORTLIST = [method for method in COMPARED if method not in ("SGD, no weight decay", "dropout")]
TIMES = (2, 4, 0.5, 0.25)  # lengths of training, relative to the tuned one
LONGER = (("mnist1d", 0.2), ("digits", 0.4))


def sgd(results: Results) -> Iterator[Trial]:
    """SGD's learning rate and weight decay are searched jointly, and its learning rate without weight decay.

    The grid gains a row or a column if its best is at an edge.
    """
    for condition in CONDITIONS:
        yield from sgd_of(results, condition)


def sgd_of(results: Results, condition: Condition) -> Iterator[Trial]:
    """Yields the trials of one condition's grid."""
    by_both = mean_by(tuned(results, condition, "SGD"), "lr", "weight_decay")
    rates = to_try(LEARNING_RATES, RATES, best_by(by_both, 0))
    decays = to_try(WEIGHT_DECAYS, DECAYS, best_by(by_both, 1))
    undecayed = {lr: score for (lr, decay), score in by_both.items() if not decay}
    without = to_try(LEARNING_RATES, RATES, undecayed)
    pairs = dict.fromkeys([*product(rates, decays), *product(without, (0.0,))])
    for (lr, decay), seed in product(pairs, TUNING_SEEDS):
        yield trial(condition, "SGD", lr, seed, weight_decay=decay)


def best_by(by_both: Mapping[Any, float], position: int) -> dict[float, float]:
    """Returns the best score of each value at one position of the key, whatever stands at the other."""
    found: dict[float, float] = {}
    for key, score in by_both.items():
        found[key[position]] = max(score, found.get(key[position], score))
    return found


def tuned(results: Results, condition: Condition, method: str) -> Results:
    """Returns the tuning trials of a method, for the settings that were run with all tuning seeds."""
    task, noise, _ = condition
    found = where(results, task=task, noise=noise, method=method, variant="", tested=False)
    setting = itemgetter(*SETTINGS)
    seeds = Counter(map(setting, found))
    return [r for r in found if seeds[setting(r)] == len(TUNING_SEEDS)]


def tuned_scores(results: Results, condition: Condition, method: str) -> dict[Setting, float]:
    """Returns the validation scores of `tuned`, by setting."""
    return mean_by(tuned(results, condition, method), *SETTINGS)


def base(results: Results, condition: Condition, **fields: Any) -> dict[str, float]:
    """Returns the learning rate and weight decay that were best for SGD, among trials with these fields."""
    by_both = mean_by(where(tuned(results, condition, "SGD"), **fields), "lr", "weight_decay")
    return dict(zip(("lr", "weight_decay"), best(by_both), strict=True))


def at_one_rate(results: Results, condition: Condition, method: str) -> list[Setting]:
    """Returns the settings to try at SGD's best learning rate, with its best weight decay and the usual one.

    For each weight decay, values are added while the best is at an end.
    """
    own, sgd = METHODS[method], base(results, condition)
    scores = tuned_scores(results, condition, method)
    lr, found = sgd["lr"], []
    for decay in dict.fromkeys([sgd["weight_decay"], conditions.DECAY]):
        by_value = {value: score for (*pair, value), score in scores.items() if pair == [lr, decay]}
        found += [(lr, decay, value) for value in to_try(own.values, own.start, by_value)]
    return found


def searched(results: Results, condition: Condition, method: str) -> Iterator[Setting]:
    """Yields all settings to try of a method: `at_one_rate`, then other learning rates with the best pair."""
    scores = tuned_scores(results, condition, method)
    at_one = at_one_rate(results, condition, method)
    yield from at_one
    if set(at_one) <= set(scores):
        lr, *pair = best({setting: scores[setting] for setting in at_one})
        by_rate = {rate: score for (rate, *others), score in scores.items() if others == pair}
        position = LEARNING_RATES.index(lr)
        beside = LEARNING_RATES[max(0, position - 1) : position + 2]
        yield from ((rate, pair[0], pair[1]) for rate in to_try(LEARNING_RATES, beside, by_rate))


def values(results: Results, condition: Condition, method: str) -> Iterator[Trial]:
    """Yields a method's tuning trials, once SGD is tuned."""
    if METHODS[method].kind != "sgd" and not missing(results, sgd_of(results, condition)):
        settings = dict.fromkeys(searched(results, condition, method))
        for (lr, decay, value), seed in product(settings, TUNING_SEEDS):
            yield trial(condition, method, value, seed, lr=lr, weight_decay=decay)


def compared_on(condition: Condition) -> list[str]:
    """Returns the methods that are searched for a condition."""
    task, noise, _ = condition
    possible = [method for method in COMPARED if conditions.fits(method, task)]
    return possible if (task, noise) not in SGD_ALONE else []


def settled(results: Results, condition: Condition, method: str) -> bool:
    """Whether a method and SGD are tuned."""
    return not missing(results, [*sgd_of(results, condition), *values(results, condition, method)])


def tuning(results: Results) -> Iterator[Trial]:
    """The value of every compared method is searched."""
    for condition in CONDITIONS:
        own = where(results, task=condition.task, noise=condition.noise)
        for method in compared_on(condition):
            yield from values(own, condition, method)


def chosen(results: Results, condition: Condition, method: str, **changes: Any) -> Trial:
    """Returns a trial with what was chosen by validation, on the first seed."""
    if METHODS[method].kind == "sgd":
        without = {"weight_decay": 0.0} if method == "SGD, no weight decay" else {}
        settings = base(results, condition, **without)
        value = settings["lr"]
    else:
        scores, tried = tuned_scores(results, condition, method), searched(results, condition, method)
        lr, decay, value = best({one: scores[one] for one in tried if one in scores})
        settings = {"lr": lr, "weight_decay": decay}
    return trial(condition, method, value, SEEDS[0], **settings, tested=True, **changes)


def comparison(results: Results) -> Iterator[Trial]:
    """Every method is tested with the values chosen for it, on fresh seeds."""
    yield from tested(results, CONDITIONS, [*COMPARED], SEEDS)


def more_seeds(results: Results) -> Iterator[Trial]:
    """The shortlisted methods of "comparison" are tested on five more seeds."""
    yield from tested(results, CONDITIONS, SHORTLIST, conditions.MORE_SEEDS)


def longer(results: Results) -> Iterator[Trial]:
    """The shortlisted methods are trained for longer and shorter than they were tuned for."""
    for condition, times in product((conditions.of(*key) for key in LONGER), TIMES):
        epochs = round(times * conditions.usual(condition.task).epochs)
        yield from tested(results, [condition], SHORTLIST, SEEDS, epochs=epochs)


def tested(
    results: Results, wanted: Iterable[Condition], methods: list[str], seeds: Iterable[int], **changes: Any
) -> Iterator[Trial]:
    """Yields the test trials of those methods whose tuning is complete."""
    for condition in wanted:
        own = where(results, task=condition.task, noise=condition.noise)
        for method in compared_on(condition):
            if method in methods and settled(own, condition, method):
                one = chosen(own, condition, method, **changes)
                yield from (replace(one, seed=seed) for seed in seeds)
