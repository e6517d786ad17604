"""Without a search: every method at its default beside usual settings; and how good the defaults are.

Learning rates: what is best for plain SGD, or 0.05 on images, where that is far below it; AdamW has 1e-3.
Weight decay: 5e-4 for SGD, torch's own 0.01 for AdamW. Beside these stands SGD with both searched.
"""

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import Any

from recipes.study.analysis import Results
from recipes.study.conditions import (
    CHEAP,
    CONDITIONS,
    FRESH_SEEDS,
    LANGUAGE,
    LATER_SEEDS,
    MORE_SEEDS,
    TUNING_SEEDS,
    Condition,
    cheap_first,
    of,
    trial,
)
from recipes.study.methods import METHODS
from recipes.study.search import base, chosen, sgd_of
from recipes.study.tasks import TASKS
from recipes.study.trial import Trial, missing

DEFAULTS = {  # noise: of 4.5 %, the best for these conditions by validation
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
DEFAULT_SEEDS = (*LATER_SEEDS, *MORE_SEEDS)  # by which none of these values was chosen
USUAL_RATE = 0.05
AT_USUAL_RATE = ("fashion", "fashion-nobatchnorm", "fashion-resnet")  # SGD's best is far below it
ADAMW = {"base": "adamw", "lr": 1e-3, "weight_decay": 0.01}
WITH_ADAMW = (
    ("mnist1d", 0.2),
    ("digits", 0.4),
    ("mnist1d-layernorm", 0.2),
    ("fashion-nobatchnorm", 0.2),
    ("fashion", 0.4),
    ("fashion-vit", 0.2),
)
GRID = ((1, 10), (0.3, 10), (0.5, 10), (2, 10), (1, 5), (1, 20), (1, 40))  # lam, every
CHOSEN_ON = (
    ("mnist1d", 0.2),
    ("mnist1d", 0.0),
    ("mnist1d", 0.4),
    ("mnist1d-layernorm", 0.2),
    ("digits", 0.4),
    ("digits", 0.0),
    ("finetune-200", 0.0),
    ("fashion-nobatchnorm", 0.2),
    ("fashion", 0.4),
    ("fashion", 0.0),
    ("fashion-vit", 0.2),
)
CONFIRMED_ON: tuple[tuple[str, float, dict[str, Any]], ...] = (
    ("finetune-1000", 0.0, {}),
    ("diabetes", 0.0, {}),
    ("mnist1d", 0.2, {"width": 32}),
    ("mnist1d", 0.2, {"width": 512}),
    ("mnist1d", 0.2, {"depth": 1}),
    ("mnist1d", 0.2, {"depth": 4}),
    ("mnist1d", 0.2, {"batch_size": 256}),
)
TRIED_ON_REVIEWS = {"base": (0.0,), "FAM, proximal": (1.0, 0.5), "control, T = I": (0.3,), "SAM": (0.05,)}


def defaults(results: Results) -> Iterator[Trial]:
    """Every method at its default, seed by seed, and SGD with what was searched for it."""
    for seed, condition in product(DEFAULT_SEEDS, cheap_first()):
        if missing(results, sgd_of(results, condition)) and condition.task not in AT_USUAL_RATE:
            continue
        for settings, (method, value) in product(bases(results, condition), DEFAULTS.items()):
            if METHODS[method].kind != "smoothing" or TASKS[condition.task].predicts == "classes":
                yield trial(condition, method, value, seed, **settings, variant="defaults", tested=True)


def bar(results: Results) -> Iterator[Trial]:
    """SGD with searched learning rate and weight decay on the same seeds."""
    for seed, condition in product(DEFAULT_SEEDS, cheap_first()):
        if not missing(results, sgd_of(results, condition)):
            yield replace(chosen(results, condition, "SGD"), seed=seed)


def bases(results: Results, condition: Condition) -> Iterator[dict[str, Any]]:
    """The base optimizers of a condition with their settings."""
    usual = condition.task in AT_USUAL_RATE
    yield {"lr": USUAL_RATE if usual else base(results, condition)["lr"]}
    if (condition.task, condition.noise) in WITH_ADAMW:
        yield ADAMW


def step(results: Results) -> Iterator[Trial]:
    """lam and every of the proximal step where they were chosen, by validation."""
    for key, seed in product(sorted(CHOSEN_ON, key=lambda key: key[0] not in CHEAP), TUNING_SEEDS):
        condition = of(*key)
        for settings, (lam, every) in product(bases(results, condition), GRID):
            yield trial(
                condition, "FAM, proximal", lam, seed, **settings, every=every, variant="step"
            )


def confirmation(results: Results) -> Iterator[Trial]:
    """The same where nothing was chosen, by test scores of fresh seeds; and the base alone."""
    for seed, (task, noise, changes) in product(FRESH_SEEDS, CONFIRMED_ON):
        condition = of(task, noise)
        settings = {**changes, "lr": base(results, condition)["lr"], "variant": "confirmation", "tested": True}
        yield trial(condition, "base", 0.0, seed, **settings)
        for lam, every in GRID:
            yield trial(condition, "FAM, proximal", lam, seed, **settings, every=every)


def reviews(results: Results) -> Iterator[Trial]:
    """A pretrained language model, fine-tuned with AdamW at 1e-4."""
    settings = {**ADAMW, "lr": 1e-4, "variant": "defaults", "tested": True}
    for seed, condition, (method, values) in product(FRESH_SEEDS, LANGUAGE, TRIED_ON_REVIEWS.items()):
        for value in values:
            yield trial(condition, method, value, seed, **settings)
