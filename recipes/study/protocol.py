"""Which networks the study trains. Written before the runs; the results files repeat every field.

Hyper-parameters are chosen by the accuracy on validation data after the last epoch, averaged over two seeds
that are not used again. Validation labels are as noisy as the training labels. Test data are looked at in
the stages that are reported, once per network, after everything was chosen.
"""

from collections.abc import Callable, Iterator, Mapping
from itertools import product
from typing import Any

from recipes.study.analysis import Results, choose
from recipes.study.methods import CANDIDATES, METHODS, PARTS, WEIGHTINGS
from recipes.study.trial import Trial

EPOCHS = {"digits": 60, "mnist1d": 60, "fashion-2000": 20, "fashion-10000": 10, "fashion-60000": 6}
TUNED = ("fashion-2000", "mnist1d", "digits")
NOISES = (0.4, 0.0, 0.2)
TUNING_SEEDS = (100, 101)
SEEDS = (0, 1, 2, 3, 4)
LR = 0.05  # where it is not tuned
SHORTLIST = ("plain", "head L2", "sam", "fam", "fam detached")
BUDGETS = (3, 5, 10, 40)  # epochs; 20 is in the comparison
CONDITIONS: dict[str, dict[str, Any]] = {  # under which a single lam has to do; each changes one thing or two
    "base": {},
    "learning rate 0.0125": {"lr": 0.0125},
    "width 32": {"width": 32},
    "width 512": {"width": 512},
    "batch 256": {"batch_size": 256},
    "Adam": {"base": "adam", "lr": 1e-3},
    "clean": {"noise": 0.0},
    "MNIST-1D": {"task": "mnist1d"},
    "MNIST-1D, Adam": {"task": "mnist1d", "base": "adam", "lr": 1e-3},
    "MNIST-1D, clean": {"task": "mnist1d", "noise": 0.0},
    "digits": {"task": "digits"},
}


def trial(task: str, method: str, value: float, noise: float, seed: int, lr: float, **changes: Any) -> Trial:
    """A trial of the task's length, or a method's part of it."""
    epochs = changes.pop("epochs", EPOCHS[task])
    if METHODS[method].option == "lr":
        lr = value
    if METHODS[method].option == "weight_decay":
        changes["weight_decay"] = value
    epochs = max(1, round(METHODS[method].epochs * epochs))
    return Trial(task, method, value, noise, seed, epochs, lr, **changes)


def learning_rates(results: Results) -> Iterator[Trial]:
    """The plain optimizer's, for every task and noise; all methods take the one that is best for it."""
    for task, noise, value, seed in product(TUNED, NOISES, CANDIDATES["plain"].grid, TUNING_SEEDS):
        yield trial(task, "plain", value, noise, seed, value)


def tuning(results: Results) -> Iterator[Trial]:
    """Every other method's hyper-parameter."""
    for task, noise, method in product(TUNED, NOISES, CANDIDATES):
        lr = learning_rate(results, task, noise)
        for value, seed in product(CANDIDATES[method].grid, TUNING_SEEDS):
            if method != "plain":
                yield trial(task, method, value, noise, seed, lr)


def extension(results: Results) -> Iterator[Trial]:
    """One value more for every method whose best is the first or last of its grid."""
    for task, noise, method in product(TUNED, NOISES, CANDIDATES):
        lr = learning_rate(results, task, noise)
        grid = CANDIDATES[method].grid
        best = choose(results, task, method, noise, grid)
        for edge, beyond in zip((grid[0], grid[-1]), CANDIDATES[method].beyond, strict=True):
            if best == edge:
                for seed in TUNING_SEEDS:
                    yield trial(task, method, beyond, noise, seed, lr)


def learning_rate(results: Results, task: str, noise: float) -> float:
    """The one that all methods take: the best of the plain optimizer's grid."""
    return choose(results, task, "plain", noise, CANDIDATES["plain"].grid)


def comparison(results: Results) -> Iterator[Trial]:
    """Every method with what was chosen for it, and fresh seeds."""
    for task, noise, method, seed in product(TUNED, NOISES, CANDIDATES, SEEDS):
        yield chosen(results, task, method, noise, seed)


def chosen(
    results: Results, task: str, method: str, noise: float, seed: int, tuned_on: str = "", **changes: Any
) -> Trial:
    """A trial with what was chosen by validation, of this task or another."""
    tuned_on = tuned_on or task
    lr = learning_rate(results, tuned_on, noise)
    value = choose(results, tuned_on, method, noise)
    return trial(task, method, value, noise, seed, lr, tested=True, **changes)


def parts(results: Results) -> Iterator[Trial]:
    """Which part of the whole gradient does the harm: tuned and compared at 40 % noise."""
    task, noise = "fashion-2000", 0.4
    lr = learning_rate(results, task, noise)
    for method in PARTS:
        for value, seed in product(PARTS[method].grid, TUNING_SEEDS):
            yield trial(task, method, value, noise, seed, lr)


def parts_compared(results: Results) -> Iterator[Trial]:
    """The parts with what was chosen for them."""
    for method, seed in product(PARTS, SEEDS):
        yield chosen(results, "fashion-2000", method, 0.4, seed)


def weightings(results: Results) -> Iterator[Trial]:
    """Ways to weigh kappa, under many conditions; for the choice of a default by validation accuracy."""
    for name, seed in product(CONDITIONS, TUNING_SEEDS):
        fields = condition(name)
        yield trial(method="plain", value=fields["lr"], seed=seed, tested=True, **fields)
        for method, weighting in WEIGHTINGS.items():
            for value in weighting.grid:
                yield trial(method=method, value=value, seed=seed, tested=True, **fields)


def condition(name: str) -> dict[str, Any]:
    """The fields of a condition's trials."""
    standard = {"task": "fashion-2000", "noise": 0.4, "lr": LR, "width": 128, "batch_size": 64, "base": "sgd"}
    return {**standard, **CONDITIONS[name]}


def networks(results: Results) -> Iterator[Trial]:
    """Plain networks of all kinds: does kappa go with the generalisation gap?"""
    kinds = {
        "mnist1d": ((32, 128, 512), (32, 64, 256), (0.0, 5e-4, 5e-3)),
        "fashion-2000": ((32, 512), (64, 256), (0.0, 5e-3)),
    }
    for task, (widths, batch_sizes, decays) in kinds.items():
        for noise, width, batch_size, decay in product(NOISES, widths, batch_sizes, decays):
            yield Trial(
                task, "plain", LR, noise, 0, EPOCHS[task], LR, width, batch_size, "sgd", decay, tested=True
            )


def budgets(results: Results) -> Iterator[Trial]:
    """Accuracy against time: the shortlist trained for shorter and longer."""
    for noise, epochs, method, seed in product((0.4, 0.0), BUDGETS, SHORTLIST, SEEDS[:3]):
        yield chosen(results, "fashion-2000", method, noise, seed, epochs=epochs)


def larger(results: Results) -> Iterator[Trial]:
    """10,000 images, the shortlist, with the values chosen on 2,000."""
    for noise, seed, method in product((0.4, 0.0), SEEDS[:2], SHORTLIST):
        yield chosen(results, "fashion-10000", method, noise, seed, "fashion-2000")


def largest(results: Results) -> Iterator[Trial]:
    """All images, once."""
    for noise, method in product((0.4, 0.0), SHORTLIST):
        yield chosen(results, "fashion-60000", method, noise, 0, "fashion-2000")


STAGES: Mapping[str, Callable[[Results], Iterator[Trial]]] = {
    "learning_rates": learning_rates,
    "tuning": tuning,
    "extension": extension,
    "comparison": comparison,
    "parts": parts,
    "parts_compared": parts_compared,
    "weightings": weightings,
    "budgets": budgets,
    "larger": larger,
    "networks": networks,
    "largest": largest,
}
