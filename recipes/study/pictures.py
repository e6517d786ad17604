"""Pictures of the study, from its saved results."""

import statistics
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.ticker import ScalarFormatter

from recipes.shared.pictures import save, tidy
from recipes.study import protocol
from recipes.study.analysis import Results, values_of, where, with_interval
from recipes.study.methods import COMPARED
from recipes.study.protocol import CONDITIONS
from recipes.study.tables import gains, lam_scores, of

COLOURS = {
    "SGD": "#555555",
    "label smoothing": "#b8860b",
    "noise, hidden layers": "#009e73",
    "SAM": "#0072b2",
    "ASAM": "#56b4e9",
    "FAM, last layer, detached": "#e69f00",
    "FAM, last but one": "#cc79a7",
    "FAM, hidden": "#d1495b",
    "FAM, hidden, detached": "#7b5ea7",
}


def draw(stages: Mapping[str, Results], costs: Mapping[str, Any], folder: Path) -> None:
    """Draw what the stages that were run allow."""
    compared = [*stages["comparison"], *stages["more_seeds"]]
    if compared:
        gain_by_method(compared, folder / "gain.png")
    if stages["longer"] and costs:
        accuracy_by_time([*stages["longer"], *stages["comparison"]], costs, folder / "accuracy_by_time.png")
    if stages["lam"]:
        loss_by_lam(list(chain(*stages.values())), folder / "lam.png")


def gain_by_method(compared: Results, target: Path) -> None:
    """Gain over tuned SGD: a point per condition, and the mean over conditions with its interval."""
    methods = [m for m in COMPARED if m != "SGD" and where(compared, method=m)]
    found = {method: gains(compared, CONDITIONS, method, "SGD") for method in methods}
    means = {method: [statistics.fmean(v) for v in own.values()] for method, own in found.items()}
    methods.sort(key=lambda method: statistics.fmean(means[method]))
    figure, axis = plt.subplots(figsize=(7.2, 4.2))
    for row, method in enumerate(methods):
        colour = COLOURS.get(method, "#888888")
        axis.scatter(means[method], [row] * len(means[method]), s=16, color=colour, alpha=0.45, linewidths=0)
        mean, half = with_interval(means[method])
        axis.errorbar([mean], [row], xerr=[half], fmt="D", color=colour, markersize=6, capsize=3)
    axis.axvline(0, color=COLOURS["SGD"], linewidth=1)
    axis.set_yticks(range(len(methods)), methods)
    axis.set(xlabel="gain over SGD with tuned learning rate and weight decay, points of test score")
    tidy(axis)
    figure.tight_layout()
    save(figure, target)


def accuracy_by_time(results: Results, costs: Mapping[str, Any], target: Path) -> None:
    """Test accuracy against training time, one point per length of training; a panel per condition."""
    shown = [c for c in (protocol.of(*key) for key in protocol.LONGER) if timed(results, costs, c)]
    figure, axes = plt.subplots(1, len(shown), figsize=(2 + 5 * len(shown), 3.8), squeeze=False)
    for axis, condition in zip(axes[0], shown, strict=True):
        ratios = costs["tasks"][condition.task]["methods"]
        for method in protocol.SHORTLIST:
            own = where(of(results, condition), method=method)
            if method not in ratios or not own:
                continue
            epochs = sorted({r["epochs"] for r in own})
            values = [values_of(where(own, epochs=number), "test_score") for number in epochs]
            times = [number * ratios[method]["ratio"] for number in epochs]
            means = [statistics.fmean(seeds) for seeds in values]
            errors = [statistics.stdev(seeds) if len(seeds) > 1 else 0 for seeds in values]
            axis.errorbar(
                times, means, errors, fmt="o-", color=COLOURS[method], label=method, markersize=4, capsize=2
            )
        axis.set(xscale="log", xlabel="training time, in epochs of SGD", ylabel="test accuracy, %")
        axis.xaxis.set_major_formatter(ScalarFormatter())
        axis.set_title(condition.name, loc="left", fontsize=9)
        tidy(axis)
    axes[0, -1].legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.tight_layout()
    save(figure, target)


def timed(results: Results, costs: Mapping[str, Any], condition: protocol.Condition) -> bool:
    """Whether a condition has several lengths of training, and a cost."""
    return condition.task in costs["tasks"] and len({r["epochs"] for r in of(results, condition)}) > 2


def loss_by_lam(results: Results, target: Path) -> None:
    """Validation score lost against the best lam, a line per condition or variant."""
    figure, axes = plt.subplots(1, len(protocol.WITH_ONE_LAM), figsize=(9.6, 3.8), sharey=True)
    for axis, method in zip(axes, protocol.WITH_ONE_LAM, strict=True):
        for name, (_, scores) in lam_scores(results, method).items():
            top = max(scores.values())
            axis.plot(
                list(scores), [score - top for score in scores.values()], "o-", label=name, markersize=3
            )
        axis.set(xscale="log", xlabel="lam")
        axis.set_title(method, loc="left", fontsize=9)
        tidy(axis)
    axes[0].set(ylabel="validation score minus the best, points")
    axes[0].legend(frameon=False, fontsize=6)
    figure.tight_layout()
    save(figure, target)
