"""The picture of the quick start, from its JSON: test accuracy and kappa by epoch.

python -m recipes.plot_quickstart runs/quickstart/quickstart.json
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # draws to files, needs no display

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullLocator
from numpy.typing import NDArray

from recipes.results import load

COLOURS = {"SGD": "#555555", "SAM": "#0072b2", "FAM": "#e69f00", "FAM, detach_hessian": "#d1495b"}


def plot(source: Path, target: Path) -> None:
    """Draw one row per noise level: accuracy left, kappa right; a line per method, a thin one per seed."""
    runs = load(source)["runs"]
    levels = sorted({run["noise"] for run in runs})
    figure, axes = plt.subplots(
        len(levels), 2, figsize=(9, 0.8 + 2.9 * len(levels)), sharex=True, squeeze=False
    )
    for (left, right), noise in zip(axes, levels, strict=True):
        chosen = [run for run in runs if run["noise"] == noise]
        labels = f"{noise:.0%} wrong labels" if noise else "clean labels"
        left.set_title(f"test accuracy (%), {labels}", loc="left", fontsize=10)
        right.set_title(f"kappa of the training set, {labels}", loc="left", fontsize=10)
        draw(left, chosen, "test_accuracy")
        draw(right, chosen, "kappa")
        left.set_ylim(bottom=lower_limit(chosen))
        right.set_yscale("log")
        right.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        right.yaxis.set_major_formatter("{x:g}")
        right.yaxis.set_minor_locator(NullLocator())
    for axis in axes[-1]:
        axis.set_xlabel("epoch")
    handles, names = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, names, loc="upper center", ncols=len(names), frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.35 / figure.get_figheight()))
    figure.savefig(target, dpi=120)
    plt.close(figure)


def draw(axis: Axes, runs: Sequence[dict[str, Any]], quantity: str) -> None:
    """Draw a quantity by epoch: each method's mean over the seeds, and the seeds themselves, faint."""
    for method in dict.fromkeys(run["method"] for run in runs):
        curves = [values(run, quantity) for run in runs if run["method"] == method]
        epochs = np.arange(1, len(curves[0]) + 1)
        for curve in curves:
            axis.plot(epochs, curve, color=COLOURS[method], linewidth=0.8, alpha=0.35)
        axis.plot(epochs, np.mean(curves, axis=0), color=COLOURS[method], linewidth=1.8, label=method)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)


def values(run: dict[str, Any], quantity: str) -> NDArray[np.float64]:
    """Return a column of the history; null becomes nan, which matplotlib leaves out."""
    return np.array(run["history"][quantity], dtype=np.float64)


def lower_limit(runs: Sequence[dict[str, Any]]) -> float:
    """Cut the first epochs' climb off, so that the differences at the end can be seen."""
    lows = [np.sort(values(run, "test_accuracy"))[len(run["history"]["test_accuracy"]) // 8] for run in runs]
    return float(min(lows)) - 1


def main() -> None:
    """Draw the picture beside the JSON."""
    parser = argparse.ArgumentParser(prog="python -m recipes.plot_quickstart")
    parser.add_argument("results", type=Path, help="the JSON that recipes.quickstart wrote")
    path = parser.parse_args().results
    plot(path, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
