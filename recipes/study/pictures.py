"""Pictures of the study, from its saved results."""

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.ticker import NullFormatter

from recipes.shared.pictures import save, tidy
from recipes.study.analysis import GAPS, Results, mean_by_value, values_of, where
from recipes.study.methods import WEIGHTINGS
from recipes.study.protocol import CONDITIONS, EPOCHS, SHORTLIST, condition

COLOURS = {
    "plain": "#555555",
    "head L2": "#009e73",
    "sam": "#0072b2",
    "fam": "#e69f00",
    "fam detached": "#d1495b",
    "fixed": "#d1495b",
    "fixed, warm-up": "#e69f00",
    "share of gradient": "#0072b2",
    "share of loss": "#009e73",
    "fixed, whole gradient": "#7b5ea7",
}
NAMES = {"plain": "SGD", "sam": "SAM", "fam": "FAM", "fam detached": "FAM, detach_hessian"}


def draw(stages: Mapping[str, Results], costs: Mapping[str, Any], folder: Path) -> None:
    """Draw what the stages that were run allow."""
    if stages["budgets"]:
        accuracy_by_time(stages["budgets"] + stages["comparison"], costs, folder / "accuracy_by_time.png")
    if stages["weightings"]:
        accuracy_by_weight(stages["weightings"], folder / "weightings.png")
    if stages["networks"]:
        gap_by_kappa(stages["networks"], folder / "gap_by_kappa.png")


def accuracy_by_time(results: Results, costs: Mapping[str, Any], target: Path) -> None:
    """Test accuracy against training time, one point per number of epochs; a panel per noise."""
    found = [r for r in results if r["task"] == "fashion-2000" and r["method"] in SHORTLIST]
    noises = sorted({r["noise"] for r in found if r["epochs"] != EPOCHS["fashion-2000"]}, reverse=True)
    figure, axes = plt.subplots(1, len(noises), figsize=(4.6 * len(noises), 3.6), squeeze=False)
    for axis, noise in zip(axes[0], noises, strict=True):
        for method in SHORTLIST:
            own = where(found, noise=noise, method=method)
            epochs = sorted({r["epochs"] for r in own})
            values = [values_of(where(own, epochs=number), "test_accuracy") for number in epochs]
            times = [number * costs["methods"][method]["ratio"] for number in epochs]
            means = [statistics.fmean(seeds) for seeds in values]
            axis.errorbar(
                times,
                means,
                [statistics.stdev(seeds) if len(seeds) > 1 else 0 for seeds in values],
                fmt="o-",
                color=COLOURS[method],
                label=NAMES.get(method, method),
                markersize=4,
                capsize=2,
                linewidth=1.5,
            )
        axis.set(xscale="log", xlabel="training time, in epochs of SGD", ylabel="test accuracy, %")
        axis.set_xticks([3, 5, 10, 20, 40, 80], ["3", "5", "10", "20", "40", "80"], minor=False)
        axis.minorticks_off()
        axis.set_title(f"{noise:.0%} wrong labels" if noise else "clean labels", loc="left", fontsize=9)
        tidy(axis)
    axes[0, 0].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    save(figure, target)


def accuracy_by_weight(results: Results, target: Path) -> None:
    """Validation accuracy against lam or alpha, a panel per condition, a line per way to weigh kappa."""
    columns = 5
    rows = -(-len(CONDITIONS) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(3 * columns, 2.4 * rows), squeeze=False)
    for axis, name in zip(axes.flat, CONDITIONS, strict=False):
        found = where(results, **condition(name))
        for way in WEIGHTINGS:
            by_value = mean_by_value(where(found, method=way), "validation")
            axis.plot(*zip(*by_value.items(), strict=True), "o-", color=COLOURS[way], label=way, markersize=3)
        plain = values_of(where(found, method="plain"), "validation")
        axis.axhline(statistics.fmean(plain), color=COLOURS["plain"], linewidth=1, label="plain")
        axis.set(xscale="log")
        axis.set_title(name, loc="left", fontsize=9)
        tidy(axis)
    for axis in list(axes.flat)[len(CONDITIONS) :]:
        axis.axis("off")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    axes.flat[-1].legend(handles, labels, frameon=False, fontsize=8, loc="center")
    figure.supxlabel("lam, or alpha", fontsize=9)
    figure.supylabel("validation accuracy (noisy labels), %", fontsize=9)
    figure.tight_layout()
    save(figure, target)


def gap_by_kappa(results: Results, target: Path) -> None:
    """The generalisation gap against kappa, a point per network, a colour per noise."""
    tasks = list(dict.fromkeys(r["task"] for r in results))
    figure, axes = plt.subplots(1, len(tasks), figsize=(4.6 * len(tasks), 3.6), squeeze=False)
    for axis, task in zip(axes[0], tasks, strict=True):
        of_task = where(results, task=task)
        for noise, colour in zip((0.0, 0.2, 0.4), ("#0072b2", "#e69f00", "#d1495b"), strict=True):
            found = where(of_task, noise=noise)
            gaps = [GAPS["accuracy"](r) for r in found]
            axis.scatter(
                values_of(found, "kappa"), gaps, s=14, color=colour, label=f"{noise:.0%} wrong labels"
            )
        axis.set(xscale="log", xlabel="kappa", ylabel="training minus test accuracy, %")
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.set_title(task, loc="left", fontsize=9)
        tidy(axis)
    axes[0, 0].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    save(figure, target)
