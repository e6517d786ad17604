"""Which networks the study trains. Written before the runs; the results files repeat every field.

Values are chosen by the score on validation data after the last epoch, averaged over two seeds that are not
used again. Validation labels are as noisy as the training labels. Test data are looked at in the stages
"comparison", "more_seeds", "longer", "networks", "usual_rate" and "untuned", once per network, after
everything was chosen.

A stage is a function of what was measured before; a stage that chooses is asked again until it wants
nothing more.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, fields, replace
from itertools import product
from typing import Any, NamedTuple

from recipes.study.analysis import Results, best, mean_by, to_try, where
from recipes.study.methods import (
    BY_LAYERS,
    COMPARED,
    FORMS,
    LEARNING_RATES,
    METHODS,
    OF_CONVOLUTIONS,
    WEIGHT_DECAYS,
)
from recipes.study.tasks import TASKS
from recipes.study.trial import Trial

Setting = tuple[float, float, float]  # learning rate, weight decay, the method's own value
Search = Callable[[Results, "Condition", str], Iterable[Setting]]  # what is tried of a method


class Condition(NamedTuple):
    """What is learned."""

    task: str
    noise: float
    name: str


CONDITIONS = (  # the most telling first
    Condition("mnist1d", 0.2, "MNIST-1D, 20 % wrong"),
    Condition("mnist1d", 0.0, "MNIST-1D"),
    Condition("digits", 0.4, "digits, 40 % wrong"),
    Condition("digits", 0.0, "digits"),
    Condition("mnist1d-layernorm", 0.2, "MNIST-1D, LayerNorm, GELU, 20 % wrong"),
    Condition("diabetes", 0.0, "diabetes (regression)"),
    Condition("mnist1d", 0.4, "MNIST-1D, 40 % wrong"),
    Condition("finetune-200", 0.0, "fine-tuning on 200 digits"),
    Condition("finetune-1000", 0.0, "fine-tuning on 1,000 digits"),
    Condition("fashion", 0.4, "Fashion-MNIST, 40 % wrong"),
    Condition("fashion-nobatchnorm", 0.2, "Fashion-MNIST, no BatchNorm, 20 % wrong"),
    Condition("fashion", 0.0, "Fashion-MNIST"),
    Condition("fashion-vit", 0.2, "Fashion-MNIST, transformer, 20 % wrong"),
    Condition("fashion-resnet", 0.4, "Fashion-MNIST, ResNet, 40 % wrong"),
    Condition("fashion-resnet", 0.0, "Fashion-MNIST, ResNet"),
)
CHEAP_FIRST = (
    "diabetes",
    "digits",
    "finetune-200",
    "finetune-1000",
    "mnist1d",
    "mnist1d-layernorm",
    "fashion-nobatchnorm",
    "fashion",
    "fashion-vit",
    "fashion-resnet",
)
TUNING_SEEDS = (100, 101)
SEEDS = (5, 6, 7, 8, 9)  # of 0 to 4 test scores were known when the search became a joint one
MORE_SEEDS = (10, 11, 12, 13, 14)
LATER_SEEDS = (15, 16, 17, 18, 19)  # of stages that were added when the comparison was known
SETTINGS = ("lr", "weight_decay", "value")
DECAY = 5e-4  # the usual weight decay
RATES, DECAYS = (0.0125, 0.05, 0.2), (5e-4, 2e-3, 8e-3)  # of SGD, tried first
BY_LAYERS_ON: dict[
    tuple[str, float], Iterable[str]
] = {  # where sets of layers are compared, and what else is
    ("mnist1d", 0.2): (),
    ("mnist1d", 0.0): (),
    ("digits", 0.4): (),
    ("mnist1d-layernorm", 0.2): FORMS,
    ("mnist1d", 0.4): (),
}
SHORTLIST = (
    "SGD",
    "label smoothing",
    "noise, hidden layers",
    "SAM",
    "ASAM",
    "FAM, last layer, detached",
    "FAM, last but one",
    "FAM, hidden",
    "FAM, hidden, detached",
)
TIMES = (2, 4, 0.5, 0.25)  # lengths of training, relative to that which was tuned
LONGER = (("mnist1d", 0.2), ("fashion", 0.4))
LAMS = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
SLOWER = "a quarter of the learning rate"
USUAL_RATE = 0.05  # for these conditions, in which SGD's best learning rate is far below it
USUAL_RATE_ON: dict[tuple[str, float], Iterable[str]] = {  # and the sets of layers that are compared there
    ("fashion", 0.4): [*BY_LAYERS, *OF_CONVOLUTIONS],
    ("fashion-nobatchnorm", 0.2): (),
}
VARIANTS: dict[str, dict[str, Any]] = {  # of MNIST-1D with 20 % wrong labels: where one lam has to do
    "width 32": {"width": 32},
    "width 512": {"width": 512},
    "one hidden layer": {"depth": 1},
    "four hidden layers": {"depth": 4},
    "batches of 256": {"batch_size": 256},
    SLOWER: {},
    "Adam": {"base": "adam", "lr": 1e-3, "weight_decay": 0.0},
}
CLIP = 1.0  # the usual norm at which gradients are clipped
ONE_LAM = 3e-3
WITH_ONE_LAM = ("FAM, hidden", "FAM, hidden, detached")


def trial(condition: Condition, method: str, value: float, seed: int, **changes: Any) -> Trial:
    """A trial of the task's length, or a method's part of it."""
    task, noise, _ = condition
    own = TASKS[task]
    epochs = changes.pop("epochs", own.epochs)
    settings = {"batch_size": own.batch_size, "lr": value, "weight_decay": DECAY, **changes}
    return Trial(task, noise, method, value, seed, max(1, round(METHODS[method].epochs * epochs)), **settings)


def sgd(results: Results) -> Iterator[Trial]:
    """Learning rate and weight decay of plain SGD, jointly; and the learning rate without weight decay.

    The grid gains a row or a column where the best of it is at an edge.
    """
    for condition in CONDITIONS:
        yield from sgd_of(results, condition)


def sgd_of(results: Results, condition: Condition) -> Iterator[Trial]:
    """One condition's grid."""
    by_both = mean_by(tuned(results, condition, "SGD"), "lr", "weight_decay")
    rates = to_try(LEARNING_RATES, RATES, best_by(by_both, 0))
    decays = to_try(WEIGHT_DECAYS, DECAYS, best_by(by_both, 1))
    without = to_try(
        LEARNING_RATES, RATES, {lr: score for (lr, decay), score in by_both.items() if not decay}
    )
    pairs = dict.fromkeys([*product(rates, decays), *product(without, (0.0,))])
    for (lr, decay), seed in product(pairs, TUNING_SEEDS):
        yield trial(condition, "SGD", lr, seed, weight_decay=decay)


def best_by(by_both: Mapping[Any, float], position: int) -> dict[float, float]:
    """For each value of one of two, the score with the best of the other."""
    found: dict[float, float] = {}
    for key, score in by_both.items():
        found[key[position]] = max(score, found.get(key[position], score))
    return found


def tuned(results: Results, condition: Condition, method: str) -> Results:
    """The tuning trials of a method, as far as all tuning seeds were run."""
    found = where(
        results, task=condition.task, noise=condition.noise, method=method, variant="", tested=False
    )
    seeds = Counter((r["lr"], r["weight_decay"], r["value"]) for r in found)
    return [r for r in found if seeds[r["lr"], r["weight_decay"], r["value"]] == len(TUNING_SEEDS)]


def tuned_scores(results: Results, condition: Condition, method: str) -> dict[Setting, float]:
    """The validation scores of these trials, by setting."""
    return mean_by(tuned(results, condition, method), *SETTINGS)


def base(results: Results, condition: Condition, **fields: Any) -> dict[str, float]:
    """The learning rate and weight decay that were best for SGD; of these fields only, if there are any."""
    by_both = mean_by(where(tuned(results, condition, "SGD"), **fields), "lr", "weight_decay")
    lr, decay = best(by_both)
    return {"lr": lr, "weight_decay": decay}


def at_one_rate(results: Results, condition: Condition, method: str) -> list[Setting]:
    """A method's own value at SGD's best learning rate, with SGD's best weight decay and with the usual one.

    Each line goes on while its best is at an end.
    """
    own, sgd = METHODS[method], base(results, condition)
    scores = tuned_scores(results, condition, method)
    lr, found = sgd["lr"], []
    for decay in dict.fromkeys([sgd["weight_decay"], DECAY]):
        by_value = {value: score for (*pair, value), score in scores.items() if pair == [lr, decay]}
        found += [(lr, decay, value) for value in to_try(own.values, own.start, by_value)]
    return found


def searched(results: Results, condition: Condition, method: str) -> Iterator[Setting]:
    """All that is tried of a method: the above, then other learning rates with the best pair."""
    scores = tuned_scores(results, condition, method)
    at_one = at_one_rate(results, condition, method)
    yield from at_one
    if set(at_one) <= set(scores):
        lr, *pair = best({setting: scores[setting] for setting in at_one})
        by_rate = {rate: score for (rate, *others), score in scores.items() if others == pair}
        position = LEARNING_RATES.index(lr)
        beside = LEARNING_RATES[max(0, position - 1) : position + 2]
        yield from ((rate, pair[0], pair[1]) for rate in to_try(LEARNING_RATES, beside, by_rate))


def scores_of(
    results: Results, condition: Condition, method: str, settings: Search = searched
) -> dict[Setting, float]:
    """Validation scores of what is tried of a method, as far as measured."""
    scores = tuned_scores(results, condition, method)
    return {one: scores[one] for one in settings(results, condition, method) if one in scores}


def values(
    results: Results, condition: Condition, methods: Iterable[str], settings: Search
) -> Iterator[Trial]:
    """Tuning trials of the methods, once SGD is tuned."""
    if missing(results, sgd_of(results, condition)):
        return
    for method in methods:
        if METHODS[method].kind != "sgd" and applies(method, condition):
            yield from of_settings(condition, method, settings(results, condition, method))


def of_settings(condition: Condition, method: str, settings: Iterable[Setting]) -> Iterator[Trial]:
    """A method's tuning trials with these settings."""
    for (lr, decay, value), seed in product(dict.fromkeys(settings), TUNING_SEEDS):
        yield trial(condition, method, value, seed, lr=lr, weight_decay=decay)


def missing(results: Results, trials: Iterable[Trial]) -> list[Trial]:
    """Those that were not measured yet."""
    done = {identity(r) for r in results}
    return [one for one in dict.fromkeys(trials) if identity(asdict(one)) not in done]


def measured(results: Results, trials: Iterable[Trial]) -> Results:
    """The results of these trials; others may be left from an earlier choice."""
    wanted = {identity(asdict(one)) for one in trials}
    return [r for r in results if identity(r) in wanted]


def identity(result: Mapping[str, Any]) -> tuple[Any, ...]:
    """The fields of a result that make it the trial's; one that is older than a field has the default."""
    return tuple(result.get(field.name, field.default) for field in fields(Trial))


def settled(results: Results, condition: Condition, methods: Iterable[str]) -> bool:
    """Whether the methods are tuned."""
    wanted = [*sgd_of(results, condition), *values(results, condition, methods, searched)]
    return not missing(results, wanted)


def applies(method: str, condition: Condition) -> bool:
    """Labels can be smoothed, numbers cannot."""
    return METHODS[method].kind != "smoothing" or TASKS[condition.task].predicts == "classes"


def tuning(results: Results) -> Iterator[Trial]:
    """The value of every method that is compared."""
    for condition in CONDITIONS:
        yield from values(results, condition, COMPARED, searched)


def layers(results: Results) -> Iterator[Trial]:
    """FAM on every set of layers, at one learning rate, by validation only."""
    for (task, noise), extra in BY_LAYERS_ON.items():
        yield from values(results, of(task, noise), [*BY_LAYERS, *extra], at_one_rate)


def of(task: str, noise: float) -> Condition:
    """The condition of a task and a noise."""
    return next(c for c in CONDITIONS if (c.task, c.noise) == (task, noise))


def chosen(results: Results, condition: Condition, method: str, **changes: Any) -> Trial:
    """A trial with what was chosen by validation; the first seed."""
    if METHODS[method].kind == "sgd":
        without = {"weight_decay": 0.0} if method == "SGD, no weight decay" else {}
        settings = base(results, condition, **without)
        value = settings["lr"]
    else:
        lr, decay, value = best(scores_of(results, condition, method))
        settings = {"lr": lr, "weight_decay": decay}
    return trial(condition, method, value, SEEDS[0], **settings, tested=True, **changes)


def comparison(results: Results) -> Iterator[Trial]:
    """Every method with what was chosen for it, and fresh seeds."""
    yield from compared(results, COMPARED, SEEDS)


def more_seeds(results: Results) -> Iterator[Trial]:
    """Five more for the shortlist."""
    yield from compared(results, SHORTLIST, MORE_SEEDS)


def compared(results: Results, methods: Iterable[str], seeds: tuple[int, ...]) -> Iterator[Trial]:
    """Tested trials of the conditions whose tuning is complete."""
    for condition in CONDITIONS:
        if settled(results, condition, COMPARED):
            for method in methods:
                if applies(method, condition):
                    one = chosen(results, condition, method)
                    yield from (replace(one, seed=seed) for seed in seeds)


def longer(results: Results) -> Iterator[Trial]:
    """The shortlist trained for longer and shorter than it was tuned for."""
    for condition in (of(task, noise) for task, noise in LONGER):
        if settled(results, condition, COMPARED):
            for times, method in product(TIMES, SHORTLIST):
                epochs = round(times * TASKS[condition.task].epochs)
                one = chosen(results, condition, method, epochs=epochs)
                yield from (replace(one, seed=seed) for seed in SEEDS)


def lam(results: Results) -> Iterator[Trial]:
    """One grid of lam for every condition (where tuning left a value out) and variant; by validation only.

    At SGD's best learning rate, with the usual weight decay: as somebody who has not searched both.
    """
    for condition in CONDITIONS:
        if settled(results, condition, COMPARED):
            for method in WITH_ONE_LAM:
                left_out = set(LAMS) - set(by_lam(results, condition, method))
                for value, seed in product(sorted(left_out), TUNING_SEEDS):
                    yield trial(condition, method, value, seed, **usual(results, condition), variant="lam")
    condition = CONDITIONS[0]
    if settled(results, condition, COMPARED):
        of_method = {"SGD": base(results, condition)} | dict.fromkeys(WITH_ONE_LAM, usual(results, condition))
        for (method, settings), name, seed in product(of_method.items(), VARIANTS, TUNING_SEEDS):
            changed: dict[str, Any] = {**settings, **VARIANTS[name], "variant": name}
            if name == SLOWER:
                changed["lr"] /= 4
            for value in (changed["lr"],) if method == "SGD" else LAMS:
                yield trial(condition, method, value, seed, **changed)


def clipped(results: Results) -> Iterator[Trial]:
    """The same grid with the gradient of loss + lam * kappa clipped, and SGD at the same settings.

    Added when the stage "lam" had shown that too large a lam ends a training.
    """
    for condition in CONDITIONS:
        if settled(results, condition, COMPARED):
            settings = usual(results, condition)
            changed: dict[str, Any] = {**settings, "clip": CLIP, "variant": "clipped"}
            lams = product(WITH_ONE_LAM, LAMS)
            for (method, value), seed in product([("SGD", settings["lr"]), *lams], TUNING_SEEDS):
                yield trial(condition, method, value, seed, **changed)


def untuned(results: Results) -> Iterator[Trial]:
    """One lam, clipped gradients and the usual weight decay, tested beside SGD's best: what if one searches
    nothing but SGD's learning rate?
    """
    for condition in CONDITIONS:
        if settled(results, condition, COMPARED):
            settings = usual(results, condition)
            values = {"SGD": settings["lr"], **dict.fromkeys(WITH_ONE_LAM, ONE_LAM)}
            changed: dict[str, Any] = {**settings, "clip": CLIP, "variant": "untuned", "tested": True}
            ours = [trial(condition, *own, LATER_SEEDS[0], **changed) for own in values.items()]
            for one, seed in product([chosen(results, condition, "SGD"), *ours], LATER_SEEDS):
                yield replace(one, seed=seed)


DEFAULTS = {  # what one has who searches nothing; "noise" is a standard deviation of 4.5 %
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
DEFAULT_SEEDS = (*LATER_SEEDS, *MORE_SEEDS)  # no value here was chosen on them
AT_THE_USUAL_RATE = ("fashion", "fashion-nobatchnorm", "fashion-resnet")  # SGD's best is far below it
ADAMW = {"base": "adamw", "lr": 1e-3, "weight_decay": 0.01}
WITH_ADAMW = (
    ("mnist1d", 0.2),
    ("digits", 0.4),
    ("mnist1d-layernorm", 0.2),
    ("fashion-nobatchnorm", 0.2),
    ("fashion", 0.4),
    ("fashion-vit", 0.2),
)


def defaults(results: Results) -> Iterator[Trial]:
    """Every method at its default beside usual settings, seed by seed; nothing is searched but SGD's rate."""
    for seed in DEFAULT_SEEDS:
        for condition in sorted(CONDITIONS, key=lambda c: CHEAP_FIRST.index(c.task)):
            yield from without_a_search(results, condition, seed)


def without_a_search(results: Results, condition: Condition, seed: int) -> Iterator[Trial]:
    """One condition's, with SGD and where there is time with AdamW."""
    usual_rate = condition.task in AT_THE_USUAL_RATE
    rate = USUAL_RATE if usual_rate else base(results, condition)["lr"]
    bases: list[dict[str, Any]] = [{"lr": rate}]
    if (condition.task, condition.noise) in WITH_ADAMW:
        bases.append(ADAMW)
    for settings, (method, value) in product(bases, DEFAULTS.items()):
        if applies(method, condition) and method not in LATER:
            yield trial(condition, method, value, seed, **settings, variant="defaults", tested=True)


LATER = ("FAM, proximal",)


def usual(results: Results, condition: Condition) -> dict[str, float]:
    """SGD's best learning rate, and the usual weight decay."""
    return {**base(results, condition), "weight_decay": DECAY}


def by_lam(results: Results, condition: Condition, method: str) -> dict[float, float]:
    """Validation scores that tuning has of a method with the usual weight decay, by lam."""
    return mean_by(where(tuned(results, condition, method), **usual(results, condition)), "value")


def usual_rate(results: Results) -> Iterator[Trial]:
    """The shortlist tuned at the usual learning rate, and tested beside SGD's best on seeds of its own.

    Added when the comparison was known: with SGD's best rate there was nothing to gain in these conditions.
    """
    for key, layers in USUAL_RATE_ON.items():
        condition = of(*key)
        if missing(results, sgd_of(results, condition)):
            continue
        own = at_usual_rate(results)
        tried = [
            replace(one, variant="usual rate")
            for method in [*SHORTLIST, *layers]
            if METHODS[method].kind != "sgd"
            for one in of_settings(condition, method, at_one_rate(own, condition, method))
        ]
        yield from tried
        if not missing(results, tried):
            tested = [replace(chosen(own, condition, method), variant="usual rate") for method in SHORTLIST]
            for one, seed in product([chosen(results, condition, "SGD"), *tested], LATER_SEEDS):
                yield replace(one, seed=seed)


def at_usual_rate(results: Results) -> Results:
    """The results as if no other learning rate had been tried."""
    sgd = where(results, method="SGD", lr=USUAL_RATE, variant="")
    return [*sgd, *({**r, "variant": ""} for r in where(results, variant="usual rate"))]


def networks(results: Results) -> Iterator[Trial]:
    """Plain networks of all kinds: does kappa go with the generalisation gap?"""
    kinds = product((0.2, 0.0, 0.4), (32, 128, 512), (0.0, 5e-4, 5e-3), (32, 64, 256), (0.0125, 0.05))
    for noise, width, decay, batch_size, lr in kinds:
        changed = {"width": width, "weight_decay": decay, "batch_size": batch_size, "variant": "network"}
        yield trial(of("mnist1d", noise), "SGD", lr, 0, tested=True, **changed)


STAGES: dict[str, Callable[[Results], Iterator[Trial]]] = {
    "defaults": defaults,
    "sgd": sgd,
    "tuning": tuning,
    "layers": layers,
    "comparison": comparison,
    "longer": longer,
    "networks": networks,
    "lam": lam,
    "more_seeds": more_seeds,
    "usual_rate": usual_rate,
    "clipped": clipped,
    "untuned": untuned,
}
