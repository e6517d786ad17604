"""The study's report, as Markdown, from its saved results: every table with what one must know to read it."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from rich.table import Table

from recipes.shared.tables import markdown
from recipes.shared.tables import table as new_table
from recipes.study import tables
from recipes.study.analysis import Results, where
from recipes.study.conditions import CHEAP
from recipes.study.defaults import DEFAULTS
from recipes.study.methods import COMPARED
from recipes.study.tables import Gains, gains

Found = Mapping[str, Results]  # what was measured, by stage
FRONT = (
    "FAM, proximal",
    "noise, hidden layers",
    "control, T = I",
    "SAM",
    "label smoothing",
    "LookSAM, k = 5",
)
BOLD = "with 95 % intervals; bold: the interval leaves out zero"


class Captioned(NamedTuple):
    """A table with its heading and what one must know to read it."""

    heading: str
    caption: str
    table: Table


def write(found: Found, everything: Results, costs: Mapping[str, Any], folder: Path) -> None:
    """Write every table whose stage was run."""
    text = [
        f"\n## {t.heading}\n\n{t.caption}\n\n{markdown(t.table)}" for t in captioned(found, everything, costs)
    ]
    (folder / "tables.md").write_text("# Tables of the study\n" + "".join(text))


def captioned(found: Found, everything: Results, costs: Mapping[str, Any]) -> Iterator[Captioned]:
    """All tables that the results allow."""
    yield from of_defaults(found)
    yield from of_the_step(found)
    yield from of_the_search(found, everything)
    if costs:
        yield Captioned(
            "Cost of a step",
            "Median of the ratio to SGD's step in the same round, one thread; in brackets the quartiles.",
            tables.cost(costs),
        )


def without_a_search(found: Found, base: str) -> tuple[Results, dict[str, Gains]]:
    """The base alone, and every method's gain over it; SGD's search is one of the methods."""
    own = where(found["defaults"], base=base)
    alone = where(own, method="base")
    methods = {m: gains(where(own, method=m), alone) for m in DEFAULTS if m != "base"}
    if base == "adamw":
        methods["FAM, proximal, lam 0.5"] = gains(found["half"], alone)
    if base == "sgd":
        methods["SGD, searched"] = gains(found["bar"], alone)
    return alone, {method: gained for method, gained in methods.items() if gained}


def front(found: Found) -> Table:
    """Points over the base alone without a search: the mean over common tasks, and the worst of them."""
    heads, columns = ["method"], [list(FRONT)]
    for base, name in (("sgd", "SGD"), ("adamw", "AdamW")):
        _, by_method = without_a_search(found, base)
        own = [tables.means(by_method.get(method, {})) for method in FRONT]
        common = set(own[0]).intersection(*own[1:])
        values = [[means[condition] for condition in common] for means in own]
        heads += [f"{name}, {len(common)} tasks", "worst task"]
        columns += [[tables.signed(v) for v in values], [f"{min(v):+.1f}" if v else "" for v in values]]
    return new_table(*heads, rows=list(zip(*columns, strict=True)))


def of_defaults(found: Found) -> Iterator[Captioned]:
    """Without a search."""
    if found["defaults"]:
        yield Captioned(
            "On the front page",
            "Points of test score over the optimizer alone, every method at its default: mean over tasks, "
            "with its 95 % interval over tasks, and the worst task.",
            front(found),
        )
    for base, name in (("sgd", "SGD"), ("adamw", "AdamW")):
        alone, by_method = without_a_search(found, base)
        if not by_method:
            continue
        yield Captioned(
            f"Without a search, {name}",
            f"Points of test score (accuracy; R² of the regression) over {name} alone at the usual settings, "
            "every method at its default: the mean over conditions with its 95 % interval over conditions, "
            "bold where that leaves out zero; the number of conditions in which it is better or worse at "
            "the 5 % level after Holm's correction; and in how many it loses more than a point.",
            tables.summary(by_method),
        )
        yield Captioned(
            f"Without a search, {name}, by condition",
            f"Test score of {name} alone, and points over it, paired by seed, {BOLD}.",
            tables.by_condition(alone, by_method, f"{name} alone"),
        )
        yield Captioned(
            f"Without a search, {name}: loss on test data",
            "Negative log-likelihood (squared error of the regression), mean and standard deviation.",
            tables.scores(where(found["defaults"], base=base), DEFAULTS, "test_loss"),
        )
        reference = where(found["defaults"], base=base, method="FAM, proximal")
        others = {m: gains(reference, where(found["defaults"], base=base, method=m)) for m in DEFAULTS}
        others |= {"SGD, searched": gains(reference, found["bar"])} if base == "sgd" else {}
        others = {m: own for m, own in others.items() if own and m != "FAM, proximal"}
        if others:
            yield Captioned(
                f"FAM proximal at lam = 1 against the others, {name}",
                f"Points of test score of FAM minus those of the column's method, paired by seed, {BOLD}.",
                tables.by_condition(reference, others, "FAM, proximal"),
            )
    if found["reviews"]:
        yield Captioned(
            "Film reviews",
            "MiniLM fine-tuned with AdamW at 1e-4 on 500 sentences: test accuracy in percent and negative "
            "log-likelihood on 1,000 others, mean and standard deviation over seeds.",
            tables.reviews(found["reviews"]),
        )


def of_the_step(found: Found) -> Iterator[Captioned]:
    """lam, every, and the step's forms."""
    for stage, quantity, name in (
        ("step", "validation", "validation score, two seeds; the conditions by which the default was chosen"),
        ("confirmation", "test_score", "test score, fresh seeds; conditions that chose nothing"),
    ):
        if found[stage]:
            yield Captioned(
                f"lam and every: {stage}",
                f"Points of score lost to the best of the row ({name}).",
                tables.by_setting(tables.lost(found[stage], quantity)),
            )

    if found["flattening"]:
        yield Captioned(
            "Does it flatten?",
            "MNIST-1D with 20 % wrong labels, two hidden layers: test accuracy, and Gauss-Newton kappa of "
            'every layer on the training data after the last epoch, geometric mean over seeds. "first" and '
            '"last but one": the proximal step on this layer alone.',
            tables.flattening(found["flattening"]),
        )
    if found["ablations"]:
        yield Captioned(
            "Forms of the step",
            "Validation score, mean of two seeds, with one thing changed at a time; lam = 1, every 10 steps.",
            tables.ablations(found["ablations"]),
        )


def of_the_search(found: Found, everything: Results) -> Iterator[Captioned]:
    """With a search."""
    compared = [*found["comparison"], *found["more_seeds"]]
    sgd = where(compared, method="SGD")
    if not sgd:
        return
    by_method = {m: gains(where(compared, method=m), sgd) for m in COMPARED if m != "SGD"}
    by_method = {method: own for method, own in by_method.items() if own}
    cheap = {m: {c: v for c, v in own.items() if c.task in CHEAP} for m, own in by_method.items()}
    cheap = {method: own for method, own in cheap.items() if own}
    yield Captioned(
        "With a search",
        "Points of test score over SGD with searched learning rate and weight decay; every method's value "
        "was searched jointly with both. The mean over the nine conditions in which all methods were "
        "searched, with its 95 % interval over conditions; better and worse after Holm's correction.",
        tables.summary(cheap),
    )
    yield Captioned(
        "With a search, by condition",
        f"Test score of searched SGD, and points over it, paired by seed, {BOLD}.",
        tables.by_condition(sgd, by_method, "SGD"),
    )
    yield Captioned(
        "With a search: loss on test data",
        "Negative log-likelihood (squared error of the regression), mean and standard deviation.",
        tables.scores(compared, COMPARED, "test_loss"),
    )
    yield Captioned(
        "What was chosen",
        "The method's own value, in brackets where it is the last that could be tried; then learning rate "
        "and weight decay. All three were searched jointly.",
        tables.choices(everything),
    )
    if found["longer"]:
        yield Captioned(
            "Longer and shorter",
            "Test accuracy in percent with the values chosen for 1 x the epochs: mean ± standard deviation "
            "over five seeds.",
            tables.by_epochs([*found["longer"], *found["comparison"]]),
        )
