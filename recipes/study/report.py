"""Tables of the study, as Markdown, from its saved results."""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from rich import box
from rich.table import Table

from recipes.shared.tables import markdown
from recipes.study.analysis import (
    GAPS,
    MEASURES,
    Results,
    best_default,
    difference,
    mean_by_value,
    mean_difference,
    rank_correlation,
    values_of,
    where,
)
from recipes.study.methods import CANDIDATES, WEIGHTINGS
from recipes.study.protocol import CONDITIONS, EPOCHS, NOISES, SHORTLIST, TUNED, condition

MEASURED = {  # heading -> field, of the tables of the comparison
    "test accuracy": "test_accuracy",
    "best validation": "best_test_accuracy",
    "NLL": "test_nll",
    "ECE %": "test_ece",
    "\\|W\\|": "weight_norm",
    "\\|phi\\|": "feature_norm",
    "kappa": "kappa",
    "Tr(H)": "trace",
}


def write(stages: Mapping[str, Results], target: Path) -> None:
    """Write every table whose stage was run."""
    text = [f"\n## {heading}\n\n{markdown(table)}" for heading, table in tables(stages)]
    target.write_text("# Tables of the study\n" + "".join(text))


def tables(stages: Mapping[str, Results]) -> Iterator[tuple[str, Table]]:
    """Headings and tables."""
    compared = stages["comparison"]
    if compared:
        yield "Difference to plain SGD in test accuracy, mean over tasks, paired by seed", summary(compared)
        yield "Test accuracy after the last epoch, mean over five seeds", overview(compared)
        yield "Difference to SAM, paired by seed, with 95 % intervals", overview(compared, "sam")
    for task in TUNED:
        for noise in sorted(NOISES):
            if found := where(compared, task=task, noise=noise):
                yield f"{task}, {noise:.0%} wrong labels", comparison(found)
    if stages["parts_compared"]:
        beside = where(compared, task="fashion-2000", noise=0.4)
        shown = [r for r in beside if r["method"] in ("plain", "fam", "fam detached")]
        yield (
            "Parts of the gradient held constant, 40 % wrong labels",
            comparison(shown + stages["parts_compared"]),
        )
    for name in ("larger", "largest"):
        for noise in sorted(NOISES):
            if found := where(stages[name], noise=noise):
                heading = f"{found[0]['task']}, {noise:.0%} wrong labels, values chosen on fashion-2000"
                yield heading, comparison(found)
    if stages["budgets"]:
        yield "Test accuracy by epochs", by_epochs(stages["budgets"] + compared)
    if stages["weightings"]:
        yield "Ways to weigh kappa: what a single default loses", defaults(stages["weightings"])
        yield "Ways to weigh kappa: the best value of each, by condition", optima(stages["weightings"])
    if stages["networks"]:
        yield "Kendall's tau with the generalisation gap", correlations(stages["networks"])


def summary(compared: Results) -> Table:
    """A row per method, a column per noise and one for all: what it gains over the plain optimizer."""
    noises = sorted({r["noise"] for r in compared})
    table = Table("method", *(f"{noise:.0%} wrong labels" for noise in noises), "all", box=box.MARKDOWN)
    plain = where(compared, method="plain")
    for method in CANDIDATES:
        own = where(compared, method=method)
        if method == "plain" or not own:
            continue
        cells = []
        for chosen in (*([noise] for noise in noises), noises):
            settings = [
                {"task": task, "noise": noise}
                for task in TUNED
                for noise in chosen
                if where(compared, task=task, noise=noise)
            ]
            cells.append(interval(*mean_difference(own, plain, "test_accuracy", settings)))
        table.add_row(method, *cells)
    return table


def overview(compared: Results, reference: str = "") -> Table:
    """A row per method, a column per task and noise: accuracies, or differences to a reference."""
    columns = [(task, noise) for task in TUNED for noise in sorted(NOISES)]
    columns = [(task, noise) for task, noise in columns if where(compared, task=task, noise=noise)]
    table = Table("method", *(f"{task}, {noise:.0%}" for task, noise in columns), box=box.MARKDOWN)
    for method in CANDIDATES:
        cells = []
        for task, noise in columns:
            found = where(compared, task=task, noise=noise, method=method)
            others = where(compared, task=task, noise=noise, method=reference)
            if reference:
                cells.append(signed(found, others) if method != reference else "")
            else:
                cells.append(spread(values_of(found, "test_accuracy")))
        table.add_row(method, *cells)
    return table


def comparison(found: Results) -> Table:
    """A row per method: what was chosen, and everything measured."""
    table = Table("method", "value", *MEASURED, "difference to plain", box=box.MARKDOWN)
    plain = where(found, method="plain")
    for method in dict.fromkeys(r["method"] for r in found):
        own = where(found, method=method)
        cells = [spread(values_of(own, field)) for field in MEASURED.values()]
        table.add_row(method, f"{own[0]['value']:g}", *cells, signed(own, plain) if method != "plain" else "")
    return table


def by_epochs(results: Results) -> Table:
    """A row per method and noise, a column per number of epochs."""
    found = [r for r in results if r["task"] == "fashion-2000" and r["method"] in SHORTLIST]
    epochs = sorted({r["epochs"] for r in found})
    table = Table("wrong labels", "method", *(f"{number} epochs" for number in epochs), box=box.MARKDOWN)
    for noise in sorted({r["noise"] for r in found if r["epochs"] != EPOCHS["fashion-2000"]}):
        for method in SHORTLIST:
            own = where(found, noise=noise, method=method)
            cells = [spread(values_of(where(own, epochs=number), "test_accuracy")) for number in epochs]
            table.add_row(f"{noise:.0%}", method, *cells)
    return table


def curves(results: Results, quantity: str) -> dict[str, list[dict[float, float]]]:
    """By way to weigh kappa: for every condition a quantity by value; "kappa / m" is "fixed", renamed."""
    ways: dict[str, list[dict[float, float]]] = {}
    for name in CONDITIONS:
        fields = condition(name)
        found = where(results, **fields)
        for way in WEIGHTINGS:
            ways.setdefault(way, []).append(mean_by_value(where(found, method=way), quantity))
        by_value = {fields["width"] * value: accuracy for value, accuracy in ways["fixed"][-1].items()}
        ways.setdefault("fixed, of kappa / m", []).append(by_value)
    return ways


def defaults(results: Results) -> Table:
    """The single value of every way that loses least validation accuracy, and what it loses."""
    table = Table(
        "way",
        "default",
        "mean loss",
        "worst loss",
        "mean loss to its own optimum",
        "mean test accuracy",
        box=box.MARKDOWN,
    )
    tested = curves(results, "test_accuracy")
    for way, (default, losses, own) in best_default(curves(results, "validation")).items():
        table.add_row(
            way,
            f"{default:g}",
            f"{statistics.fmean(losses):.2f}",
            f"{max(losses):.2f}",
            f"{statistics.fmean(own):.2f}",
            f"{statistics.fmean(by_value[default] for by_value in tested[way]):.2f}",
        )
    return table


def optima(results: Results) -> Table:
    """A row per condition: each way's best value and its validation accuracy, and the plain optimizer's."""
    ways = curves(results, "validation")
    table = Table("condition", "plain", *ways, box=box.MARKDOWN)
    for number, name in enumerate(CONDITIONS):
        plain = values_of(where(results, **condition(name), method="plain"), "validation")
        cells = []
        for by_condition in ways.values():
            by_value = by_condition[number]
            value = max(by_value, key=by_value.__getitem__)
            cells.append(f"{value:g}: {by_value[value]:.1f}")
        table.add_row(name, f"{statistics.fmean(plain):.1f}", *cells)
    return table


def correlations(results: Results) -> Table:
    """A row per task and set of networks, a column per measure and gap."""
    heads = [f"{measure}, {gap}" for gap in GAPS for measure in MEASURES]
    table = Table("task", "networks", "number", *heads, box=box.MARKDOWN)
    for task in dict.fromkeys(r["task"] for r in results):
        of_task = where(results, task=task)
        sets = {"all": of_task} | {
            f"{noise:.0%} noise": where(of_task, noise=noise) for noise in sorted(NOISES)
        }
        for name, chosen in sets.items():
            cells = []
            for gap in GAPS:
                for measure in MEASURES:
                    tau, p = rank_correlation(chosen, measure, gap)
                    cells.append(f"{tau:.2f}" + ("" if p < 0.01 else " (n.s.)"))
            table.add_row(task, name, str(len(chosen)), *cells)
    return table


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation."""
    if not values:
        return ""
    mean = statistics.fmean(values)
    digits = 3 if abs(mean) < 100 else 4
    text = f"{mean:.{digits}g}" if abs(mean) >= 1e-3 else f"{mean:.1e}"
    return text if len(values) < 2 else f"{text} ± {statistics.stdev(values):.2g}"


def signed(own: Results, reference: Results) -> str:
    """The paired difference in test accuracy with its interval."""
    if len(own) < 2 or len(reference) < 2:
        return ""
    return interval(*difference(own, reference, "test_accuracy"))


def interval(mean: float, half: float) -> str:
    """A difference with its 95 % interval; bold where that leaves out zero."""
    text = f"{mean:+.1f} ± {half:.1f}"
    return f"**{text}**" if abs(mean) > half else text
