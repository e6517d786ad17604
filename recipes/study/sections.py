"""Puts the study's tables together, each with a heading and with what one must know to read it."""

from collections.abc import Iterator, Mapping
from typing import Any

from rich.table import Table

from recipes.shared.tables import titled
from recipes.study import tables
from recipes.study.analysis import Results, where
from recipes.study.defaults import DEFAULTS
from recipes.study.methods import COMPARED
from recipes.study.tables import Gains, gains

Found = Mapping[str, Results]  # what was measured, by stage
BASES = {"sgd": "SGD", "adamw": "AdamW"}
BOLD = "with 95 % intervals; bold: the interval leaves out zero"
LOSS = "Negative log-likelihood (squared error of the regression), mean and standard deviation."


def sections(found: Found, everything: Results, costs: Mapping[str, Any]) -> Iterator[Table]:
    """Yields all tables that the results allow."""
    for base, name in BASES.items():
        yield from of_defaults(found, base, name)
    yield from of_the_step(found)
    compared = [*found["comparison"], *found["more_seeds"]]
    if where(compared, method="SGD"):
        yield from of_the_search(compared, everything)
    if compared and found["longer"]:
        yield titled(
            tables.by_epochs([*found["longer"], *found["comparison"]]),
            "Longer and shorter",
            "Test accuracy in percent with the values chosen for 1 x the epochs: mean ± standard deviation "
            "over five seeds.",
        )
    if costs:
        yield titled(
            tables.cost(costs),
            "Cost of a step",
            "Median of the ratio to SGD's step in the same round, one thread; in brackets the quartiles.",
        )


def without_a_search(found: Found, base: str) -> tuple[Results, dict[str, Gains]]:
    """Returns the base alone, and every method's gain over it; SGD's search is one of the methods."""
    own = where(found["defaults"], base=base)
    alone = where(own, method="base")
    methods = {m: gains(where(own, method=m), alone) for m in DEFAULTS if m != "base"}
    if base == "adamw":
        methods["FAM, proximal, lam 0.5"] = gains(found["half"], alone)
    if base == "sgd":
        methods["SGD, searched"] = gains(found["bar"], alone)
    return alone, measured(methods)


def measured(methods: Mapping[str, Gains]) -> dict[str, Gains]:
    """Returns the methods that were measured."""
    return {method: gained for method, gained in methods.items() if gained}


def of_defaults(found: Found, base: str, name: str) -> Iterator[Table]:
    """Yields the tables without a search, over one base optimizer."""
    alone, by_method = without_a_search(found, base)
    if not by_method:
        return
    yield titled(
        tables.summary(by_method),
        f"Without a search, {name}",
        f"Points of test score (accuracy; R² of the regression) over {name} alone at the usual settings, "
        "every method at its default: the mean over conditions with its 95 % interval over conditions, "
        "bold where that leaves out zero; the number of conditions in which it is better or worse at "
        "the 5 % level after Holm's correction; and in how many it loses more than a point.",
    )
    yield titled(
        tables.by_condition(alone, by_method, f"{name} alone"),
        f"Without a search, {name}, by condition",
        f"Test score of {name} alone, and points over it, paired by seed, {BOLD}.",
    )
    results = where(found["defaults"], base=base)
    table = tables.scores(results, DEFAULTS, "test_loss")
    yield titled(table, f"Without a search, {name}: loss on test data", LOSS)
    reference = where(results, method="FAM, proximal")
    others = {m: gains(reference, where(results, method=m)) for m in DEFAULTS if m != "FAM, proximal"}
    others |= {"SGD, searched": gains(reference, found["bar"])} if base == "sgd" else {}
    if others := measured(others):
        yield titled(
            tables.by_condition(reference, others, "FAM, proximal"),
            f"FAM proximal at lam = 1 against the others, {name}",
            f"Points of test score of FAM minus those of the column's method, paired by seed, {BOLD}.",
        )


def of_the_step(found: Found) -> Iterator[Table]:
    """Yields the tables of a pretrained network, of lam and every, and of the step's forms."""
    if found["reviews"]:
        yield titled(
            tables.reviews(found["reviews"]),
            "Film reviews",
            "MiniLM fine-tuned with AdamW at 1e-4: test accuracy in percent and negative log-likelihood on "
            "1,000 other sentences, mean and standard deviation over seeds.",
        )
    for stage, quantity, name in (
        ("step", "validation", "validation score, two seeds; the conditions by which the default was chosen"),
        ("confirmation", "test_score", "test score, fresh seeds; conditions that chose nothing"),
    ):
        if found[stage]:
            yield titled(
                tables.by_setting(tables.lost(found[stage], quantity)),
                f"lam and every: {stage}",
                f"Points of score lost to the best of the row ({name}).",
            )
    if found["flattening"]:
        yield titled(
            tables.flattening(found["flattening"]),
            "Does it flatten?",
            "MNIST-1D with 20 % wrong labels, two hidden layers: test accuracy, and Gauss-Newton kappa of "
            'every layer on the training data after the last epoch, geometric mean over seeds. "first" and '
            '"last but one": the proximal step on this layer alone.',
        )
    if found["ablations"]:
        yield titled(
            tables.ablations(found["ablations"]),
            "Forms of the step",
            "Validation score, mean of two seeds, with one thing changed at a time; lam = 1, every 10 steps.",
        )


def of_the_search(compared: Results, everything: Results) -> Iterator[Table]:
    """Yields the tables with a search."""
    sgd = where(compared, method="SGD")
    by_method = measured({m: gains(where(compared, method=m), sgd) for m in COMPARED if m != "SGD"})
    yield titled(
        tables.summary(by_method),
        "With a search",
        "Points of test score over SGD with searched learning rate and weight decay; every method's value "
        "was searched jointly with both. The mean over conditions with its 95 % interval over conditions; "
        "better and worse after Holm's correction.",
    )
    yield titled(
        tables.by_condition(sgd, by_method, "SGD"),
        "With a search, by condition",
        f"Test score of searched SGD, and points over it, paired by seed, {BOLD}.",
    )
    table = tables.scores(compared, COMPARED, "test_loss")
    yield titled(table, "With a search: loss on test data", LOSS)
    yield titled(
        tables.choices(everything),
        "What was chosen",
        "The method's own value, in brackets where it is the last that could be tried; then learning rate "
        "and weight decay. All three were searched jointly.",
    )
