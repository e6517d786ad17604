"""Lists the trials without a search: every method at its default, and tests of how good the defaults are.

SGD has the usual weight decay 5e-4, and the learning rate that is best with it on validation data, but at
least 0.05 where classes are learned. AdamW has 1e-3 and torch's own weight decay. SGD with both searched is
trained for comparison.
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import product
from typing import Any

from recipes.study import conditions
from recipes.study.ablations import FORMS
from recipes.study.analysis import Results
from recipes.study.conditions import FRESH_SEEDS, TUNING_SEEDS, Condition, cheap_first, of, trial
from recipes.study.search import base, chosen, sgd_of
from recipes.study.trial import FLATTENING, Trial, missing

DEFAULTS = {  # the noise, 4.5 %, is the best for these conditions by validation
    "base": 0.0,
    "SAM": 0.05,
    "LookSAM, k = 5": 0.1,
    "LookSAM, k = 10": 0.1,
    "label smoothing": 0.1,
    "noise, hidden layers": 1e-3,
    "FAM, last layer": 8e-3,
    "control, T = I": 0.3,
    "FAM, proximal": 1.0,
}
KEY = ("FAM, proximal", "SAM", "control, T = I")
DEFAULT_SEEDS = (*conditions.LATER_SEEDS, *conditions.MORE_SEEDS)  # no default was chosen with them
USUAL_RATE = 0.05
NOT_SEARCHED = ("fashion", "fashion-resnet")  # they have the usual rate, whatever SGD's search gives
OTHER_RATES = (  # SGD's best, where it is below 0.05 or has another weight decay
    ("mnist1d", 0.0, 0.4),
    ("mnist1d", 0.4, 0.0125),
    ("mnist1d-layernorm", 0.2, 0.006),
    ("fashion-nobatchnorm", 0.2, 0.0125),
    ("fashion", 0.4, 0.003),
)
ADAMW = {"base": "adamw", "lr": 1e-3, "weight_decay": 0.01}
WITH_ADAMW = (
    ("mnist1d", 0.2),
    ("digits", 0.4),
    ("mnist1d-layernorm", 0.2),
    ("fashion-nobatchnorm", 0.2),
    ("fashion", 0.4),
    ("fashion-vit", 0.2),
)
GRID = ((0.3, 10), (0.5, 10), (1, 10), (2, 10), (1, 5), (1, 20), (1, 40))  # lam, every
NOT_CHOSEN_ON = ("finetune-1000", "diabetes", "fashion-resnet")
UNUSUAL: tuple[dict[str, Any], ...] = (
    {"width": 32},
    {"width": 512},
    {"depth": 1},
    {"depth": 4},
    {"batch_size": 256},
)
CONFIRMED_ON: tuple[tuple[str, float, dict[str, Any]], ...] = (
    ("finetune-1000", 0.0, {}),
    ("diabetes", 0.0, {}),
    *(("mnist1d", 0.2, changes) for changes in UNUSUAL),
)
ABLATED_ON = (*(("mnist1d", noise) for noise in (0.2, 0.0, 0.4)), ("mnist1d-layernorm", 0.2), ("digits", 0.4))
FLATTENED = {"base": 0.0, "SAM": 0.05, "FAM, proximal": 1.0, "first": 1.0, "last but one": 1.0}
REVIEWED = (
    ("base", 0.0),
    ("FAM, proximal", 1.0),
    ("SAM", 0.05),
    ("FAM, proximal", 0.5),
    ("control, T = I", 0.3),
)


def defaults(results: Results) -> Iterator[Trial]:
    """Every method at its default is trained seed by seed, those of the front page first."""
    front = ("base", *KEY)
    for seeds, methods in product(
        (conditions.LATER_SEEDS, conditions.MORE_SEEDS), (front, sorted(DEFAULTS.keys() - {*front}))
    ):
        for seed, condition in product(seeds, with_a_rate(results, cheap_first())):
            for settings, method in product(bases(results, condition), methods):
                if conditions.fits(method, condition.task):
                    value = DEFAULTS[method]
                    yield trial(condition, method, value, seed, **settings, variant="defaults", tested=True)


def other_rates(results: Results) -> Iterator[Trial]:
    """The main methods at their defaults are trained at other learning rates of SGD."""
    for seed, (task, noise, lr), method in product(conditions.LATER_SEEDS, OTHER_RATES, ("base", *KEY)):
        settings = {"lr": lr, "variant": "other rate", "tested": True}
        yield trial(of(task, noise), method, DEFAULTS[method], seed, **settings)


def half(results: Results) -> Iterator[Trial]:
    """The proximal step at half its lam is trained with AdamW, where a pilot had found this safer."""
    for seed, key in product(DEFAULT_SEEDS, WITH_ADAMW):
        yield trial(of(*key), "FAM, proximal", 0.5, seed, **ADAMW, variant="half", tested=True)


def bar(results: Results) -> Iterator[Trial]:
    """SGD with searched learning rate and weight decay is trained on the same seeds."""
    for seed, condition in product(DEFAULT_SEEDS, cheap_first()):
        if not missing(results, sgd_of(results, condition)):
            yield replace(chosen(results, condition, "SGD"), seed=seed)


def bases(results: Results, condition: Condition) -> Iterator[dict[str, Any]]:
    """Yields the settings of each base optimizer of a condition."""
    yield {"lr": rate(results, condition)}
    if (condition.task, condition.noise) in WITH_ADAMW:
        yield ADAMW


def with_a_rate(results: Results, wanted: Iterable[Condition]) -> list[Condition]:
    """Returns the conditions whose learning rate is known; the others wait for SGD's search."""
    return [c for c in wanted if c.task in NOT_SEARCHED or not missing(results, sgd_of(results, c))]


def rate(results: Results, condition: Condition) -> float:
    """Returns SGD's usual learning rate on a condition."""
    if condition.task in NOT_SEARCHED:
        return USUAL_RATE
    best = base(results, condition, weight_decay=conditions.DECAY)["lr"]
    return max(best, USUAL_RATE) if conditions.classifies(condition.task) else best


def step(results: Results) -> Iterator[Trial]:
    """lam and every are varied on the tasks where they were chosen, and compared by validation."""
    wanted = [c for c in cheap_first() if c.task not in NOT_CHOSEN_ON]
    for condition, seed in product(with_a_rate(results, wanted), TUNING_SEEDS):
        for settings, (lam, every) in product(bases(results, condition), GRID):
            yield trial(condition, "FAM, proximal", lam, seed, **settings, every=every, variant="step")


def confirmation(results: Results) -> Iterator[Trial]:
    """lam and every are varied where nothing was chosen, beside the base alone, and tested on fresh seeds."""
    for seed, (task, noise, changes) in product(FRESH_SEEDS, CONFIRMED_ON):
        for condition in with_a_rate(results, [of(task, noise)]):
            settings = {**changes, "lr": rate(results, condition), "variant": "confirmation", "tested": True}
            yield trial(condition, "base", 0.0, seed, **settings)
            for lam, every in GRID:
                yield trial(condition, "FAM, proximal", lam, seed, **settings, every=every)


def ablations(results: Results) -> Iterator[Trial]:
    """Other forms of the proximal step are compared by validation."""
    wanted = with_a_rate(results, [of(*key) for key in ABLATED_ON])
    for seed, condition, (name, form) in product(TUNING_SEEDS, wanted, FORMS.items()):
        settings = {"lr": rate(results, condition), "variant": "ablations"}
        yield trial(condition, name, form.lam, seed, **settings)


def flattening(results: Results) -> Iterator[Trial]:
    """kappa of every layer is measured along the training."""
    wanted = with_a_rate(results, [of("mnist1d", 0.2)])
    for seed, condition, (method, value) in product(FRESH_SEEDS, wanted, FLATTENED.items()):
        settings = {"lr": rate(results, condition), "variant": FLATTENING, "tested": True}
        yield trial(condition, method, value, seed, **settings)


def reviews(results: Results) -> Iterator[Trial]:
    """A pretrained language model is fine-tuned with AdamW at 1e-4."""
    settings = {**ADAMW, "lr": 1e-4, "variant": "defaults", "tested": True}
    for (method, value), seed, condition in product(REVIEWED, FRESH_SEEDS, conditions.LANGUAGE):
        yield trial(condition, method, value, seed, **settings)
