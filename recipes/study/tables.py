"""The study's tables: what a row, a column and a cell are."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any

from rich import box
from rich.table import Table

from recipes.shared.timing import with_quartiles
from recipes.study import protocol
from recipes.study.analysis import (
    GAPS,
    Quantity,
    Results,
    best,
    differences,
    holm,
    mean_by,
    p_value,
    rank_correlation,
    values_of,
    where,
    with_interval,
)
from recipes.study.methods import BY_LAYERS, COMPARED, METHODS
from recipes.study.protocol import CONDITIONS, Condition
from recipes.study.tasks import TASKS

LEVEL = 0.05  # of significance
DETAILS = {  # heading -> field
    "test score": "test_score",
    "early stopping": "best_test_score",
    "test loss": "test_loss",
    "ECE %": "test_ece",
    "noise": "noise_score",
    "blur": "blur_score",
    "contrast": "contrast_score",
    "training score": "train_score",
}


def of(results: Results, condition: Condition) -> Results:
    """A condition's trials."""
    return where(results, task=condition.task, noise=condition.noise)


def gains(
    compared: Results, conditions: Sequence[Condition], method: str, reference: str
) -> dict[Condition, list[float]]:
    """Of every condition that has both, the differences by seed."""
    found = {}
    for condition in conditions:
        results = of(compared, condition)
        own, other = where(results, method=method), where(results, method=reference)
        if own and other:
            found[condition] = differences(own, other, "test_score")
    return found


def summary(compared: Results, conditions: Sequence[Condition]) -> Table:
    """A row per method: what it gains over tuned SGD."""
    groups: dict[str, Callable[[Condition], bool]] = {
        "all conditions": lambda c: True,
        "wrong labels": lambda c: c.noise > 0,
        "clean": lambda c: c.noise == 0,
    }
    table = Table("method", *groups, "better", "worse", "smallest gain", box=box.MARKDOWN)
    for method in COMPARED:
        found = gains(compared, conditions, method, "SGD")
        if method == "SGD" or not found:
            continue
        means = {condition: statistics.fmean(values) for condition, values in found.items()}
        cells = [
            signed([mean for condition, mean in means.items() if belongs(condition)])
            for belongs in groups.values()
        ]
        p = holm({condition: p_value(values) for condition, values in found.items()})
        better = sum(p[c] < LEVEL and mean > 0 for c, mean in means.items())
        worse = sum(p[c] < LEVEL and mean < 0 for c, mean in means.items())
        table.add_row(method, *cells, f"{better} of {len(means)}", f"{worse}", f"{min(means.values()):+.1f}")
    return table


def by_condition(
    compared: Results, conditions: Sequence[Condition], cell: Callable[[Results, Results], str]
) -> Table:
    """A row per condition, a column per method; the cell is a function of its trials and SGD's."""
    methods = [method for method in COMPARED if where(compared, method=method)]
    table = Table("condition", *methods, box=box.MARKDOWN)
    for condition in conditions:
        results = of(compared, condition)
        sgd = where(results, method="SGD")
        cells = [cell(own, sgd) if (own := where(results, method=method)) else "" for method in methods]
        table.add_row(condition.name, *cells)
    return table


def versus(compared: Results, conditions: Sequence[Condition], ours: str) -> Table:
    """A row per condition, a column per other method of the shortlist: our gain over it."""
    others = [method for method in protocol.SHORTLIST if method != ours]
    found = {other: gains(compared, conditions, ours, other) for other in others}
    table = Table("condition", *others, box=box.MARKDOWN)
    p = {other: holm({c: p_value(values) for c, values in found[other].items()}) for other in others}
    for condition in conditions:
        cells = [
            interval(found[other][condition], p[other][condition] < LEVEL)
            if condition in found[other]
            else ""
            for other in others
        ]
        table.add_row(condition.name, *cells)
    means = [signed([statistics.fmean(v) for v in found[other].values()]) for other in others]
    table.add_row("mean over conditions", *means)
    return table


def choices(results: Results) -> Table:
    """A row per condition, a column per method: value, learning rate and weight decay that were chosen."""
    table = Table("condition", *COMPARED, box=box.MARKDOWN)
    for condition in CONDITIONS:
        if not protocol.settled(results, condition, COMPARED):
            continue
        cells = []
        for method in COMPARED:
            if not protocol.applies(method, condition):
                cells.append("")
                continue
            one, grid = protocol.chosen(results, condition, method), METHODS[method].values
            own = f"{one.value:g}; " if grid else ""
            if grid and one.value in (grid[0], grid[-1]):
                own = f"({one.value:g}); "
            cells.append(f"{own}{one.lr:g}, {one.weight_decay:g}")
        table.add_row(condition.name, *cells)
    return table


def layer_sets(results: Results) -> Table:
    """A row per set of layers, a column per condition."""
    conditions = [protocol.of(task, noise) for task, noise in protocol.BY_LAYERS_ON]
    shown = [c for c in conditions if where(of(results, c), method=next(iter(BY_LAYERS)))]
    methods = [name for name, method in METHODS.items() if method.kind == "fam"]
    table = Table("layers", *(c.name for c in shown), box=box.MARKDOWN)
    sgd = [mean_by(protocol.tuned(results, c, "SGD"), "lr", "weight_decay") for c in shown]
    table.add_row("SGD", *(f"{max(scores.values()):.1f}" for scores in sgd))
    for method in methods:
        scores = [protocol.scores_of(results, c, method, protocol.at_one_rate) for c in shown]
        if any(scores):
            cells = [f"{max(s.values()):.1f} ({best(s)[-1]:g})" if s else "" for s in scores]
            table.add_row(method, *cells)
    return table


def usual_rate(results: Results, own_stage: Results, condition: Condition) -> Table:
    """SGD's best of all; then a row per method and set of layers at the usual learning rate."""
    tested = where(of(own_stage, condition), tested=True)
    reference = where(tested, variant="")
    heads = ("method", "weight decay", "value", "validation", "test score", "over SGD's best")
    table = Table(*heads, box=box.MARKDOWN)

    def add(name: str, scores: Mapping[protocol.Setting, float], own: Results) -> None:
        lr, decay, value = best(scores)
        settings = [f"{decay:g}", "" if value == lr else f"{value:g}"]
        gain = signed(differences(own, reference, "test_score")) if own and own != reference else ""
        score = spread(values_of(own, "test_score"))
        table.add_row(name, *settings, f"{max(scores.values()):.1f}", score, gain)

    scores = protocol.tuned_scores(results, condition, "SGD")
    add(f"SGD's best, at {best(scores)[0]:g}", scores, reference)
    at_rate = protocol.at_usual_rate(results)
    for method in METHODS:
        if scores := protocol.tuned_scores(at_rate, condition, method):
            add(method, scores, where(tested, method=method, variant="usual rate"))
    return table


def by_epochs(results: Results) -> Table:
    """A row per condition and method, a column per length of training."""
    times = sorted({1, *protocol.TIMES})
    table = Table("condition", "method", *(f"{t:g} x" for t in times), box=box.MARKDOWN)
    for condition in (protocol.of(task, noise) for task, noise in protocol.LONGER):
        found = of(results, condition)
        lengths = [round(t * TASKS[condition.task].epochs) for t in times]
        if not where(found, epochs=lengths[0]):
            continue
        for method in protocol.SHORTLIST:
            own = [where(found, method=method, epochs=epochs) for epochs in lengths]
            table.add_row(condition.name, method, *(spread(values_of(r, "test_score")) for r in own))
    return table


def lam_scores(results: Results, method: str) -> dict[str, tuple[float, dict[float, float]]]:
    """By condition or variant: SGD's validation score, and the method's by lam."""
    found = {}
    for condition in CONDITIONS:
        if protocol.settled(results, condition, COMPARED):
            settings = protocol.usual(results, condition)
            own = where(of(results, condition), method=method, tested=False, **settings)
            scores = mean_by([r for r in own if r["variant"] in ("", "lam")], "value")
            sgd = max(mean_by(protocol.tuned(results, condition, "SGD"), "lr", "weight_decay").values())
            found[condition.name] = (sgd, scores)
    for name in protocol.VARIANTS:
        own = where(results, variant=name)
        if own:
            sgd = statistics.fmean(values_of(where(own, method="SGD"), "validation"))
            found[f"{CONDITIONS[0].name}, {name}"] = (sgd, mean_by(where(own, method=method), "value"))
    lams = set(protocol.LAMS)
    return {
        name: (sgd, {lam: scores[lam] for lam in protocol.LAMS})
        for name, (sgd, scores) in found.items()
        if lams <= set(scores)
    }


def untuned(own_stage: Results) -> Table:
    """A row per condition: SGD's best, and what is gained over it without a search."""
    methods = ("SGD", *protocol.WITH_ONE_LAM)
    table = Table("condition", "SGD, searched", *methods, box=box.MARKDOWN)
    found: dict[str, list[float]] = {method: [] for method in methods}
    for condition in CONDITIONS:
        results = of(own_stage, condition)
        reference, without_search = where(results, variant=""), where(results, variant="untuned")
        if not reference or not without_search:  # one may be complete before the other
            continue
        cells = []
        for method in methods:
            gained = differences(where(without_search, method=method), reference, "test_score")
            found[method].append(statistics.fmean(gained))
            cells.append(signed(gained))
        table.add_row(condition.name, spread(values_of(reference, "test_score")), *cells)
    table.add_row("mean over conditions", "", *(signed(gained) for gained in found.values()))
    return table


def clipped_scores(results: Results, method: str) -> dict[str, tuple[float, dict[float, float]]]:
    """By condition, with the gradient clipped: SGD's validation score, and the method's by lam."""
    found = {}
    for condition in CONDITIONS:
        own = where(of(results, condition), variant="clipped")
        if own:
            sgd = statistics.fmean(values_of(where(own, method="SGD"), "validation"))
            found[condition.name] = (sgd, mean_by(where(own, method=method), "value"))
    return found


def one_lam(results: Results, method: str, *, clipped: bool = False) -> Table:
    """A row per condition or variant: what every lam loses there against the best; then mean and worst."""
    free = lam_scores(results, method)
    found = clipped_scores(results, method) if clipped else free
    found = {name: found[name] for name in free if name in found}  # one may be complete before the other
    of_sgd = ("SGD, searched", "SGD") if clipped else ("SGD",)
    table = Table("condition", *of_sgd, *(f"lam {lam:g}" for lam in protocol.LAMS), box=box.MARKDOWN)
    rows = []
    for name, (sgd, scores) in found.items():
        searched, others = free[name]
        top = max(*scores.values(), *others.values())
        known = [*([searched] if clipped else []), sgd, *(scores[lam] for lam in protocol.LAMS)]
        rows.append([top - score for score in known])
        table.add_row(name, *(f"{lost:.1f}" for lost in rows[-1]))
    columns = list(zip(*rows, strict=True))
    table.add_row("mean", *(f"{statistics.fmean(column):.2f}" for column in columns))
    table.add_row("worst", *(f"{max(column):.1f}" for column in columns))
    return table


QUANTITIES: dict[str, Quantity] = {
    "kappa, first layer": lambda r: r["kappas"][0],
    "kappa, second layer": lambda r: r["kappas"][1],
    "kappa, last layer": lambda r: r["kappas"][2],
    "kappa, hidden layers": lambda r: sum(r["kappas"][:-1]),
    "kappa, all layers": lambda r: sum(r["kappas"]),
    "squared norm, hidden layers": lambda r: sum(r["norms"][:-1]),
    "squared norm, last layer": lambda r: r["norms"][-1],
}


def correlations(results: Results) -> Table:
    """A row per quantity; columns: gap, over all or with confounders held fixed."""
    known = [r for r in results if None not in (r["train_loss"], r["test_loss"], *r["kappas"])]
    sets: dict[str, tuple[str, ...]] = {
        "all networks": (),
        "within noise": ("noise",),
        "noise, width, decay fixed": ("noise", "width", "weight_decay"),
    }
    heads = [f"{name}: {gap}" for gap in GAPS for name in sets]
    table = Table("quantity", *heads, box=box.MARKDOWN)
    for name, quantity in QUANTITIES.items():
        cells = []
        for gap in GAPS.values():
            for fixed in sets.values():
                tau, p, _ = rank_correlation(known, quantity, gap, fixed)
                cells.append(f"{tau:.2f}" + ("" if p < 0.01 else " (n.s.)"))
        table.add_row(name, *cells)
    return table


def cost(costs: Mapping[str, Any]) -> Table:
    """A row per method, a column per network."""
    found = costs["tasks"]
    heads = [f"{task} ({own['milliseconds']:.2g} ms)" for task, own in found.items()]
    table = Table("method", *heads, box=box.MARKDOWN)
    for method in dict.fromkeys(chain(*(own["methods"] for own in found.values()))):
        cells = []
        for own in found.values():
            timed = own["methods"].get(method)
            cells.append(with_quartiles(timed["ratio"], timed["quartiles"]) if timed else "")
        table.add_row(method, *cells)
    return table


def details(results: Results) -> Table:
    """A row per method: everything measured."""
    shown = {head: field for head, field in DETAILS.items() if field in results[0]}
    table = Table("method", "value", "learning rate", "weight decay", "seeds", *shown, box=box.MARKDOWN)
    for method in COMPARED:
        own = where(results, method=method)
        if own:
            cells = [spread([r[field] for r in own if r.get(field) is not None]) for field in shown.values()]
            settings = [f"{own[0][name]:g}" for name in ("value", "lr", "weight_decay")]
            table.add_row(method, *settings, str(len(own)), *cells)
    return table


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation."""
    if not values:
        return ""
    mean = statistics.fmean(values)
    text = f"{mean:.2f}" if abs(mean) < 10 else f"{mean:.1f}"
    if len(values) < 2 or not math.isfinite(mean):
        return text
    return f"{text} ± {statistics.stdev(values):.{2 if abs(mean) < 10 else 1}f}"


def signed(values: Sequence[float]) -> str:
    """A mean difference with its 95 % interval; bold where that leaves out zero."""
    if len(values) < 2:
        return f"{values[0]:+.1f}" if values else ""
    mean, half = with_interval(values)
    return interval(values, abs(mean) > half)


def interval(values: Sequence[float], bold: bool) -> str:
    """A mean difference with its 95 % interval."""
    mean, half = with_interval(values)
    text = f"{mean:+.1f} ± {half:.1f}"
    return f"**{text}**" if bold else text
