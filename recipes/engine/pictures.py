"""The pictures of a report: what changed by epoch, and the spread over samples."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # draws to files, needs no display

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

Run = dict[str, Any]
COLOURS = {"sgd": "#555555", "nesterov": "#555555", "adam": "#555555", "sam": "#0072b2", "asam": "#56b4e9"}
OTHERS = ("#e69f00", "#d1495b", "#009e73", "#cc79a7", "#7b5ea7", "#8c6d31", "#1b9e9e", "#b2df8a")


def plot_curves(runs: Sequence[Run], target: Path) -> None:
    """Draw a row per task: what was measured after every epoch; a faint line per seed."""
    tasks = list(dict.fromkeys(run["task"] for run in runs))
    names = [name for name, values in runs[0]["history"].items() if name != "epoch" and None not in values]
    width, height = 3.6 * len(names), 0.6 + 2.8 * len(tasks)
    figure, axes = plt.subplots(len(tasks), len(names), figsize=(width, height), squeeze=False)
    for row, task in zip(axes, tasks, strict=True):
        for axis, name in zip(row, names, strict=True):
            draw(axis, [run for run in runs if run["task"] == task], name)
            axis.set_title(f"{name.replace('_', ' ')}, {task}", loc="left", fontsize=9)
    for axis in axes[-1]:
        axis.set_xlabel("epoch")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper center", ncols=len(labels), frameon=False, fontsize=9)
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.35 / height))
    figure.savefig(target, dpi=110)
    plt.close(figure)


def draw(axis: Axes, runs: Sequence[Run], name: str) -> None:
    """Draw each optimizer's mean over its seeds, and the seeds themselves, faint."""
    length = max(len(run["history"]["epoch"]) for run in runs)
    for label, colour in colours(runs).items():
        curves = np.stack([curve(run, name, length) for run in runs if run["label"] == label])
        epochs = np.arange(1, curves.shape[1] + 1)
        for seed in curves:
            axis.plot(epochs, seed, color=colour, linewidth=0.8, alpha=0.35)
        axis.plot(epochs, curves.mean(0), color=colour, linewidth=1.8, label=label)
    if name == "kappa" and all(np.nanmin(curve(run, name, length)) > 0 for run in runs):
        axis.set_yscale("log")
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)


def colours(runs: Sequence[Run]) -> dict[str, str]:
    """A colour per optimizer, the same in every panel."""
    labels = list(dict.fromkeys(run["label"] for run in runs))
    free = iter(OTHERS * (1 + len(labels) // len(OTHERS)))
    return {label: COLOURS.get(label.split("-")[0]) or next(free) for label in labels}


def curve(run: Run, name: str, length: int) -> NDArray[np.float64]:
    """A quantity by epoch; nan where it was not measured or not finite, which is left out of the picture."""
    values = run["history"].get(name, [])
    known = [np.nan if value is None else np.mean(value) for value in values]
    return np.array(known + [np.nan] * (length - len(known)), dtype=np.float64)


def plot_boxes(runs: Sequence[Run], target: Path) -> None:
    """Draw the last epoch's spread over the samples, for the quantities that have a value per sample."""
    names = [name for name, values in runs[0]["history"].items() if isinstance(values[-1], list)]
    runs = [run for run in runs if names and isinstance(run["history"].get(names[0], [None])[-1], list)]
    if not runs:
        return
    chosen = colours(runs)
    columns = min(3, len(names))
    rows = -(-len(names) // columns)
    size = (3 * columns + 1.5, rows * (0.7 + 0.28 * len(chosen)))
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, sharey=True)
    for axis, name in zip(axes.flat, names, strict=False):
        samples = [
            np.concatenate([run["history"][name][-1] for run in runs if run["label"] == label])
            for label in chosen
        ]
        boxes = axis.boxplot(
            samples,
            orientation="horizontal",
            manage_ticks=False,
            patch_artist=True,
            widths=0.6,
            medianprops={"color": "black"},
            flierprops={"markersize": 3},
        )
        for box, colour in zip(boxes["boxes"], chosen.values(), strict=True):
            box.set(facecolor=colour, alpha=0.6)
        axis.set_title(name.replace("_", " "), loc="left", fontsize=9)
        axis.grid(alpha=0.25, axis="x")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_yticks(range(1, len(chosen) + 1), list(chosen))
    axes[0, 0].invert_yaxis()  # the first on top
    figure.tight_layout()
    figure.savefig(target, dpi=110)
    plt.close(figure)
