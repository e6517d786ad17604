"""Draws the study's pictures from its saved results."""

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import ScalarFormatter

from recipes.shared.pictures import GREY, legend_above, looks, panels, save, tidy
from recipes.study import search, tables
from recipes.study.analysis import Results, values_of, where, with_interval
from recipes.study.conditions import of
from recipes.study.defaults import GRID
from recipes.study.sections import Found, without_a_search

GAINS = (
    "FAM, proximal",
    "control, T = I",
    "noise, hidden layers",
    "SAM",
    "LookSAM, k = 5",
    "label smoothing",
    "FAM, last layer",
    "SGD, searched",
)
FLATTENED_NAMES = {
    "base": "SGD",
    "SAM": "SAM",
    "FAM, proximal": "FAM, proximal, all hidden layers",
    "first": "FAM, proximal, layer 1 alone",
    "last but one": "FAM, proximal, layer 2 alone",
}
BY_TIME = ("SGD", "noise, hidden layers", "SAM", "LookSAM, k = 5", "FAM, hidden, detached", "FAM, proximal")
LOST = 5.0  # points, the range of the picture for choosing lam
LOOKS: dict[str, Any] = looks([*GAINS, *BY_TIME])
LOOKS |= looks(["SGD", "first", "last but one"])
LOOKS["base"] = LOOKS["SGD"]


def draw(found: Found, costs: Mapping[str, Any], folder: Path) -> None:
    """Draws the pictures of those stages that were run."""
    if found["defaults"]:
        gain_by_method(found, folder / "front.png")
    if found["longer"] and costs:
        accuracy_by_time([*found["longer"], *found["comparison"]], costs, folder / "accuracy_by_time.png")
    if found["step"] and found["confirmation"]:
        lost_by_setting(found, folder / "lam.png")
    if found["flattening"]:
        kappa_by_epoch(found["flattening"], folder / "kappa.png")


def gain_by_method(found: Found, target: Path) -> None:
    """Draws the gain over SGD alone: a point per condition, and the mean over them with its interval."""
    _, gained = without_a_search(found, "sgd")
    methods = [method for method in reversed(GAINS) if method in gained]
    figure, ((axis,),) = panels(1, 1, 7.2, 3.6)
    for row, method in enumerate(methods):
        values = list(tables.means(gained[method]).values())
        look = LOOKS[method]
        axis.scatter(values, [row] * len(values), s=18, alpha=0.45, linewidths=0, **look)
        if len(values) > 1:
            mean, half = with_interval(values)
            style = {"fmt": look["marker"], "color": look["color"]}
            axis.errorbar([mean], [row], xerr=[half], markersize=8, capsize=4, **style)
    axis.axvline(0, color=GREY, linewidth=1)
    axis.set_yticks(range(len(methods)), methods)
    axis.set(xlabel="points of test score over SGD at usual settings: every task, and their mean")
    tidy(axis)
    save(figure, target)


def accuracy_by_time(results: Results, costs: Mapping[str, Any], target: Path) -> None:
    """Draws test accuracy by training time: a point per length of training, a panel per condition."""
    shown = [c for c in (of(*key) for key in search.LONGER) if c.task in costs["tasks"]]
    figure, axes = panels(1, len(shown), 1 + 4 * len(shown), 3.8)
    for axis, condition in zip(axes[0], shown, strict=True):
        ratios = costs["tasks"][condition.task]["methods"]
        for method in BY_TIME:
            own = where(tables.of(results, condition), method=method)
            if method in ratios and own:
                by_length(axis, own, ratios[method]["ratio"], method)
        axis.set(xscale="log", xlabel="training time, in epochs of SGD", ylabel="test accuracy, %")
        axis.xaxis.set_major_formatter(ScalarFormatter())
        tidy(axis, condition.name)
    legend_above(figure, axes[0, 0], 3)
    save(figure, target)


def by_length(axis: Axes, own: Results, ratio: float, method: str) -> None:
    """Draws one method's line."""
    epochs = sorted({r["epochs"] for r in own})
    values = [values_of(where(own, epochs=number), "test_score") for number in epochs]
    means = [statistics.fmean(seeds) for seeds in values]
    errors = [statistics.stdev(seeds) if len(seeds) > 1 else 0 for seeds in values]
    times = [number * ratio for number in epochs]
    axis.errorbar(times, means, errors, label=method, markersize=5, capsize=2, **LOOKS[method])


def kappa_by_epoch(results: Results, target: Path) -> None:
    """Draws kappa of every layer by epoch, a panel per layer: geometric mean over seeds."""
    names = dict.fromkeys(r["method"] for r in results)
    layers = len(next(iter(results[0]["kappas"].values())))
    figure, axes = panels(1, layers, 1 + 2.8 * layers, 3.6, sharey=True)
    for layer, axis in enumerate(axes[0]):
        for method in names:
            own = where(results, method=method)
            epochs = list(own[0]["kappas"])
            means = [statistics.geometric_mean(r["kappas"][e][layer] for r in own) for e in epochs]
            style = {"label": FLATTENED_NAMES[method], "markersize": 5, **LOOKS[method]}
            axis.plot([*map(int, epochs)], means, **style)
        axis.set(xlabel="epoch")
        tidy(axis, f"layer {layer + 1} of {layers}", log="y")
    axes[0, 0].set(ylabel="kappa (Gauss-Newton) on the training data")
    legend_above(figure, axes[0, 0], 3)
    save(figure, target)


def lost_by_setting(found: Found, target: Path) -> None:
    """Draws the points lost to the best setting, mean and worst over conditions, by lam and by every."""
    figure, axes = panels(1, 2, 8.4, 3.4, sharey=True)
    stages = (
        ("step", "chosen by", "validation", LOOKS["FAM, proximal"]["color"], "o"),
        ("confirmation", "confirmed on", "test_score", GREY, "s"),
    )
    for axis, position, label in ((axes[0, 0], 0, "lam, every 10 steps"), (axes[0, 1], 1, "every, lam = 1")):
        settings = sorted(key for key in GRID if key[1 - position] == (10, 1)[position])
        places = [key[position] for key in settings]
        for stage, name, quantity, colour, marker in stages:
            rows = [own for own in tables.lost(found[stage], quantity).values() if set(own) >= set(GRID)]
            for what, of_rows, style in (("mean", statistics.fmean, "-"), ("worst", max, ":")):
                lost = [of_rows([own[key] for own in rows]) for key in settings]
                said = f"{what} of {len(rows)} tasks, {name}"
                axis.plot(places, lost, style, marker=marker, color=colour, label=said)
        axis.set(xscale="log", xlabel=label, ylim=(LOST, 0))
        axis.set_xticks(places)
        axis.xaxis.set_major_formatter(ScalarFormatter())
        axis.minorticks_off()
        tidy(axis)
    axes[0, 0].set(ylabel="points lost to the best of these")
    legend_above(figure, axes[0, 0], 2)
    save(figure, target)
