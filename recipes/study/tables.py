"""Makes the study's tables: it says what their rows, columns and cells are."""

import math
import statistics
from collections.abc import Collection, Mapping, Sequence
from itertools import chain, product
from typing import Any

from rich.table import Table

from recipes.shared.results import grouped
from recipes.shared.tables import table
from recipes.shared.timing import with_quartiles
from recipes.study import analysis, search
from recipes.study.ablations import FORMS
from recipes.study.analysis import Results, mean_by, values_of, where
from recipes.study.conditions import CONDITIONS, LANGUAGE, Condition, usual
from recipes.study.conditions import of as condition_of
from recipes.study.defaults import GRID
from recipes.study.methods import COMPARED, METHODS
from recipes.tasks.small import DEPTH, WIDTH

LEVEL = 0.05  # of significance
ALL = (*CONDITIONS, *LANGUAGE)
Gains = dict[Condition, list[float]]  # points of test score, seed by seed


def of(results: Results, condition: Condition) -> Results:
    """Returns a condition's trials."""
    return where(results, task=condition.task, noise=condition.noise)


def by_conditions(results: Results) -> dict[Condition, Results]:
    """Returns the trials of every condition that has any."""
    return {condition: own for condition in ALL if (own := of(results, condition))}


def gains(own: Results, reference: Results) -> Gains:
    """Returns the differences by seed, for every condition in which both have a common seed."""
    found = {c: analysis.differences(of(own, c), of(reference, c), "test_score") for c in ALL}
    return {condition: values for condition, values in found.items() if values}


def means(found: Gains) -> dict[Condition, float]:
    """Returns the mean over the seeds, for every condition."""
    return {condition: statistics.fmean(values) for condition, values in found.items()}


def summary(by_method: Mapping[str, Gains]) -> Table:
    """Makes a table, a row per method: its mean gains, where it is better or worse, and its smallest gain."""
    heads = ("all conditions", "wrong labels", "clean", "better", "worse")
    result = table("method", *heads, "loses more than a point", "smallest gain")
    for method, found in by_method.items():
        mean = means(found)
        groups = [list(mean), [c for c in mean if c.noise > 0], [c for c in mean if c.noise == 0]]
        p = analysis.holm({condition: analysis.p_value(values) for condition, values in found.items()})
        better, worse = (sum(p[c] < LEVEL and sign * mean[c] > 0 for c in mean) for sign in (1, -1))
        lost = sum(value < -1 for value in mean.values())
        cells = [*(signed([mean[c] for c in group]) for group in groups), f"{better} of {len(mean)}"]
        result.add_row(method, *cells, f"{worse}", f"{lost}", f"{min(mean.values()):+.1f}")
    return result


def by_condition(reference: Results, by_method: Mapping[str, Gains], name: str) -> Table:
    """Makes a table, a row per condition: the reference's score, each method's gain; last the mean gains."""
    result = table("condition", "seeds", name, *by_method)
    for condition, own in by_conditions(reference).items():
        cells = [signed(found.get(condition, [])) for found in by_method.values()]
        result.add_row(condition.name, str(len(own)), spread(values_of(own, "test_score")), *cells)
    averages = [signed(list(means(found).values())) for found in by_method.values()]
    result.add_row("mean over conditions", "", "", *averages)
    return result


def scores(results: Results, methods: Collection[str], quantity: str) -> Table:
    """Makes a table, a row per condition and a column per method: mean and standard deviation over seeds."""
    result = table("condition", *methods)
    for condition, own in by_conditions(results).items():
        known = [r for r in own if r.get(quantity) is not None]
        cells = [spread([r[quantity] for r in where(known, method=method)]) for method in methods]
        result.add_row(condition.name, *cells)
    return result


def choices(everything: Results) -> Table:
    """Makes a table, a row per condition and a column per method: chosen value, rate and weight decay."""
    searched = {c: compared for c in CONDITIONS if (compared := search.compared_on(c))}
    rows = [
        [condition.name, *(choice(everything, condition, m) if m in compared else "" for m in COMPARED)]
        for condition, compared in searched.items()
    ]
    return table("condition", *COMPARED, rows=rows)


def choice(everything: Results, condition: Condition, method: str) -> str:
    """Returns a cell of `choices`; it is empty where the search is not complete."""
    if not search.settled(everything, condition, method):
        return ""
    one, grid = search.chosen(everything, condition, method), METHODS[method].values
    own = f"({one.value:g}); " if one.value in (*grid[:1], *grid[-1:]) else f"{one.value:g}; " if grid else ""
    return f"{own}{one.lr:g}, {one.weight_decay:g}"


def by_epochs(results: Results) -> Table:
    """Makes a table with a row per condition and method, and a column per length of training."""
    times = sorted({1, *search.TIMES})
    result = table("condition", "method", *(f"{t:g} x" for t in times))
    for condition in (condition_of(task, noise) for task, noise in search.LONGER):
        found = of(results, condition)
        lengths = [round(t * usual(condition.task).epochs) for t in times]
        for method in search.SHORTLIST:
            own = [where(found, method=method, epochs=epochs) for epochs in lengths]
            if all(own):
                result.add_row(condition.name, method, *(spread(values_of(r, "test_score")) for r in own))
    return result


# The proximal step: lam and every

Losses = dict[str, dict[tuple[float, int], float]]  # row -> (lam, every) -> points lost to the row's best
VARIED = {"width": "width {}", "depth": "{} hidden layers", "batch_size": "batches of {}"}


def lost(results: Results, quantity: str) -> Losses:
    """Returns the points that every lam and every lose against the best of the row."""
    found = {}
    for name, own in grouped(where(results, method="FAM, proximal"), row_name).items():
        by_setting = mean_by(own, "value", "every", quantity=quantity)
        found[name] = {key: max(by_setting.values()) - score for key, score in by_setting.items()}
    return found


def row_name(r: Mapping[str, Any]) -> str:
    """Returns the condition's name, with what is unusual about the network."""
    name = condition_of(r["task"], r["noise"]).name
    ordinary = {"width": WIDTH, "depth": DEPTH, "batch_size": usual(r["task"]).batch_size}
    unusual = [text.format(r[field]) for field, text in VARIED.items() if r[field] != ordinary[field]]
    unusual += ["AdamW"] if r["base"] == "adamw" else []
    return ", ".join([name, *unusual]).replace("1 hidden layers", "1 hidden layer")


def by_setting(losses: Losses) -> Table:
    """Makes a table, a row per condition, a column per lam and every: points lost; then mean and worst."""
    complete = {name: own for name, own in losses.items() if set(own) >= set(GRID)}
    result = table("condition", *(f"lam {lam:g}, every {every}" for lam, every in GRID))
    for name, own in complete.items():
        result.add_row(name, *(f"{own[key]:.1f}" for key in GRID))
    columns = [[own[key] for own in complete.values()] for key in GRID]
    result.add_row("mean", *(f"{statistics.fmean(column):.2f}" for column in columns if column))
    result.add_row("worst", *(f"{max(column):.1f}" for column in columns if column))
    return result


def reviews(results: Results) -> Table:
    """Makes a table, a row per task, method and value: accuracy and loss with clean and wrong labels."""
    heads = [f"{labels}: {what}" for labels in ("clean", "20 % wrong") for what in ("accuracy", "loss")]
    result = table("sentences", "method", *heads, "seeds")
    for task, name in {c.task: c.name for c in LANGUAGE}.items():
        for method, value in dict.fromkeys((r["method"], r["value"]) for r in where(results, task=task)):
            own = where(results, task=task, method=method, value=value)
            pairs = product((0.0, 0.2), ("test_score", "test_loss"))
            cells = [spread(values_of(where(own, noise=noise), quantity)) for noise, quantity in pairs]
            full = f"{method}, lam = {value:g}" if method == "FAM, proximal" else method
            result.add_row(name.partition(" ")[0], full, *cells, str(len({r["seed"] for r in own})))
    return result


def ablations(results: Results) -> Table:
    """Makes a table, a row per form, a column per condition: validation score; then the mean difference."""
    found = by_conditions(results)
    scores = [mean_by(own, "method") for own in found.values()]
    result = table("form", *(condition.name for condition in found), "mean, minus the first row's")
    usual, *_ = FORMS
    for form in FORMS:
        if all({form, usual} <= set(own) for own in scores):
            average = statistics.fmean(own[form] - own[usual] for own in scores)
            result.add_row(form, *(f"{own[form]:.1f}" for own in scores), f"{average:+.1f}")
    return result


def flattening(results: Results) -> Table:
    """Makes a table, a row per method: test score, and kappa of every layer after the last epoch."""
    layers = len(next(iter(results[0]["kappas"].values())))
    result = table("method", "test score", *(f"kappa, layer {layer + 1}" for layer in range(layers)), "seeds")
    for method in dict.fromkeys(r["method"] for r in results):
        own = where(results, method=method)
        last = [list(r["kappas"].values())[-1] for r in own]
        means = [f"{statistics.geometric_mean(kappas):.3g}" for kappas in zip(*last, strict=True)]
        result.add_row(method, spread(values_of(own, "test_score")), *means, str(len(own)))
    return result


def cost(costs: Mapping[str, Any]) -> Table:
    """Makes a table, a row per method and a column per network: time of a step relative to SGD's."""
    found = costs["tasks"]
    result = table("method", *(f"{task} ({own['milliseconds']:.2g} ms)" for task, own in found.items()))
    for method in dict.fromkeys(chain(*(own["methods"] for own in found.values()))):
        timed = [own["methods"].get(method) for own in found.values()]
        cells = [with_quartiles(one["ratio"], one["quartiles"]) if one else "" for one in timed]
        result.add_row(method, *cells)
    return result


def spread(values: Sequence[float]) -> str:
    """Returns mean and standard deviation as text."""
    if not values:
        return ""
    mean = statistics.fmean(values)
    text = f"{mean:.2f}" if abs(mean) < 10 else f"{mean:.1f}"
    if len(values) < 2 or not math.isfinite(mean):
        return text
    return f"{text} ± {statistics.stdev(values):.{2 if abs(mean) < 10 else 1}f}"


def signed(values: Sequence[float]) -> str:
    """Returns a mean difference with its 95 % interval, in bold where that leaves out zero."""
    if len(values) < 2:
        return f"{values[0]:+.1f}" if values else ""
    mean, half = analysis.with_interval(values)
    text = f"{mean:+.1f} ± {half:.1f}"
    return f"**{text}**" if abs(mean) > half else text
