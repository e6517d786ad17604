"""The study's report, as Markdown, from its saved results: every table with what one must know to read it."""

from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from rich.table import Table

from recipes.shared.tables import markdown
from recipes.study import tables
from recipes.study.analysis import Results, differences, values_of, where
from recipes.study.protocol import (
    CLIP,
    CONDITIONS,
    DECAY,
    ONE_LAM,
    USUAL_RATE,
    WITH_ONE_LAM,
)


class Captioned(NamedTuple):
    """A table with its heading and what one must know to read it."""

    heading: str
    caption: str
    table: Table


def write(stages: Mapping[str, Results], costs: Mapping[str, Any], target: Path) -> None:
    """Write every table whose stage was run."""
    text = [f"\n## {t.heading}\n\n{t.caption}\n\n{markdown(t.table)}" for t in captioned(stages, costs)]
    target.write_text("# Tables of the study\n" + "".join(text))


def captioned(stages: Mapping[str, Results], costs: Mapping[str, Any]) -> Iterator[Captioned]:
    """All tables that the stages allow."""
    everything = list(chain(*stages.values()))
    compared = [*stages["comparison"], *stages["more_seeds"]]
    found = [c for c in CONDITIONS if tables.of(compared, c)]
    if compared:
        yield Captioned(
            "Gain over tuned SGD",
            "Points of test score (accuracy; R² of the regression) over SGD with tuned learning rate and "
            f"weight decay, paired by seed: the mean over {len(found)} conditions with its 95 % interval "
            "over conditions, bold where that leaves out zero; and the number of conditions in which the "
            "method is better or worse at the 5 % level after Holm's correction.",
            tables.summary(compared, found),
        )
        yield Captioned(
            "Test score by condition",
            "Percent after the last epoch: mean ± standard deviation over five seeds, or ten where the "
            "shortlist has them.",
            tables.by_condition(compared, found, lambda own, _: tables.spread(values_of(own, "test_score"))),
        )
        yield Captioned(
            "Gain over tuned SGD by condition",
            "Points of test score, paired by seed, with 95 % intervals; bold where the interval leaves out "
            "zero (not corrected for the number of conditions).",
            tables.by_condition(
                compared, found, lambda own, sgd: tables.signed(differences(own, sgd, "test_score"))
            ),
        )
        for ours in WITH_ONE_LAM:
            yield Captioned(
                f"{ours}: difference to others",
                f"Points of test score of {ours} minus those of the column's method, paired by seed, with "
                "95 % intervals; bold where p is below 5 % after Holm's correction for the number of "
                "conditions. The last row is the mean over conditions, with the interval over conditions.",
                tables.versus(compared, found, ours),
            )
    if stages["sgd"]:
        yield Captioned(
            "What was chosen",
            "The method's own value, in brackets where it is the last that could be tried; then learning "
            "rate and weight decay. All three were searched jointly.",
            tables.choices(everything),
        )
    if stages["layers"]:
        yield Captioned(
            "Which layers",
            "Best validation score (labels as noisy as in training) of each set of layers at SGD's best "
            "learning rate, mean of two seeds, in brackets its lam; SGD's own is the best of its whole grid.",
            tables.layer_sets(everything),
        )
    for condition in CONDITIONS:
        if where(tables.of(stages["usual_rate"], condition), variant="usual rate"):
            yield Captioned(
                f"At a learning rate of {USUAL_RATE:g}: {condition.name}",
                "SGD's best of its whole grid, then methods and sets of layers at this learning rate: the "
                "weight decay (the usual one or SGD's best at this rate) and own value with the best "
                "validation score (mean of two seeds); test score, mean ± standard deviation over five seeds "
                "that were used for nothing else, and its difference to SGD's best, paired by seed.",
                tables.usual_rate(everything, stages["usual_rate"], condition),
            )
    if stages["longer"]:
        yield Captioned(
            "Longer and shorter",
            "Test accuracy in percent with the values chosen for 1 x the epochs: mean ± standard deviation "
            "over five seeds.",
            tables.by_epochs([*stages["longer"], *stages["comparison"]]),
        )
    if stages["lam"]:
        for method in WITH_ONE_LAM:
            yield Captioned(
                f"One lam: {method}",
                "Points of validation score (two seeds) that SGD, and that every lam, loses against the best "
                "of these lams in the same row.",
                tables.one_lam(everything, method),
            )
    if stages["clipped"]:
        for method in WITH_ONE_LAM:
            yield Captioned(
                f"One lam, gradients clipped: {method}",
                f"The same with the gradient of loss + lam * kappa clipped to a norm of {CLIP:g}; SGD too, "
                "at the same learning rate and weight decay. Points lost against the best lam of the "
                "row, clipped or not.",
                tables.one_lam(everything, method, clipped=True),
            )
    if stages["untuned"]:
        yield Captioned(
            "Without a search",
            "Test score of SGD with searched learning rate and weight decay; and the points over it, paired "
            f"by seed, with 95 % intervals, of SGD and of FAM with lam = {ONE_LAM:g}, with gradients clipped "
            f"to a norm of {CLIP:g}, the usual weight decay of {DECAY:g} and SGD's best learning rate: five "
            "seeds that were used for nothing else. Bold: the interval leaves out zero. The last row is the "
            "mean over conditions, with the interval over conditions.",
            tables.untuned(stages["untuned"]),
        )
    if stages["networks"]:
        yield Captioned(
            "Kendall's tau with the generalisation gap",
            f"{len(stages['networks'])} perceptrons trained with SGD on MNIST-1D: over all; and within cells "
            "in which the named fields are the same, the mean over cells. n.s.: one-sided p above 1 %.",
            tables.correlations(stages["networks"]),
        )
    if costs:
        yield Captioned(
            "Cost of a step",
            "Median of the ratio to SGD's step in the same round, one thread; in brackets the quartiles.",
            tables.cost(costs),
        )
    for condition in found:
        yield Captioned(
            condition.name,
            "Values chosen; mean ± standard deviation over seeds. Early stopping: test score of the epoch "
            "with the best validation score, of ten that were looked at. Noise, blur, contrast: accuracy on "
            "shifted images, mean of five strengths.",
            tables.details(tables.of(compared, condition)),
        )
