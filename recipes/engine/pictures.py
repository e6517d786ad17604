"""Draws the pictures of a report: what changed by epoch, and the spread over samples."""

from collections.abc import Sequence
from itertools import zip_longest
from operator import itemgetter
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator, SymmetricalLogLocator
from numpy.typing import NDArray

from recipes.shared.pictures import SERIES, legend_above, looks, panels, tidy
from recipes.shared.results import grouped

Run = dict[str, Any]
WIDTH = 8.2  # inches, about 1,000 pixels: what a README shows
NAMES = {  # what axes call quantities, by the end of their name, with the unit
    "train_loss": "training loss",
    "accuracy": "accuracy (%)",
    "dsc": "DSC (0 to 1)",
    "hd": "HD (voxels)",
    "hd95": "HD95 (voxels)",
    "nll": "NLL (nats)",
    "explained": "R² (%)",
    "mse": "squared error",
    "kappa": "kappa",
}
MARKED = 6  # markers on a curve, about
LEADING = ("accuracy", "dsc", "explained")  # the metrics that have a panel


def title(name: str) -> str:
    """Returns what an axis or a column calls a quantity, such as "test accuracy (%)"."""
    if name in NAMES:
        return NAMES[name]
    samples, _, metric = name.rpartition("_")
    return f"{samples.replace('_', ' ')} {NAMES.get(metric, metric)}".strip()


def fewest(runs: Sequence[Run]) -> list[Run]:
    """Returns the runs that fit a picture: of many labels, those with the best first metric at the end."""
    by_label = grouped(runs, lambda run: run["label"])
    if len(by_label) <= SERIES:
        return list(runs)
    lead = quantities(runs)[0]

    def end(label: str) -> float:
        values = np.array([curve(run, lead)[-1] for run in by_label[label]])
        return float(np.nan_to_num(values, nan=-np.inf).mean())

    best = sorted(by_label, key=end)[-SERIES:]
    return [run for run in runs if run["label"] in best]


def plot_curves(runs: Sequence[Run]) -> Figure:
    """Draws what was measured by epoch: a row or two of panels per task, a faint line per seed."""
    tasks = {task: fewest(own) for task, own in grouped(runs, itemgetter("task")).items()}
    names = {task: quantities(own) for task, own in tasks.items()}
    most = max(map(len, names.values()))
    columns = 2 if most in (2, 4) else min(3, most)
    rows = {task: -(-len(shown) // columns) for task, shown in names.items()}
    count = sum(rows.values())
    figure, axes = panels(count, columns, WIDTH, 0.6 + 2.3 * count)
    lines = iter(axes)
    chosen = looks(run["label"] for own in tasks.values() for run in own)
    for task, own in tasks.items():
        block = [axis for _ in range(rows[task]) for axis in next(lines)]
        for axis, name in zip_longest(block, names[task]):
            if name is None:
                axis.axis("off")
                continue
            draw(axis, own, name, chosen)
            unit = f" ({loss_unit(own)})" if name in ("train_loss", "kappa") else ""
            axis.set(xlabel="epoch (number)", ylabel=title(name) + unit)
            tidy(axis, task if axis is block[0] else "")
    legend_above(figure, axes[0, 0], 3)
    return figure


def loss_unit(runs: Sequence[Run]) -> str:
    """Returns the unit of the loss and of kappa: a cross-entropy's, a Dice loss's or a squared error's."""
    names = {name.rpartition("_")[2] for run in runs for name in run["history"]}
    return "nats" if "accuracy" in names else "Dice loss" if "dsc" in names else "squared error"


def quantities(runs: Sequence[Run]) -> list[str]:
    """Returns what has a panel: the leading metric of every evaluation set, the training loss, and kappa."""
    known = dict.fromkeys(name for run in runs for name in run["history"])
    leading = [name for name in known if name.rpartition("_")[2] in LEADING]
    tested = [name for name in leading if not name.startswith("validation_")]
    return [*(tested or leading), *(name for name in ("train_loss", "kappa") if name in known)]


def draw(axis: Axes, runs: Sequence[Run], name: str, chosen: dict[str, dict[str, str]]) -> None:
    """Draws each optimizer's mean over its seeds, and the seeds themselves as faint lines."""
    shown = []
    for number, (label, seeds) in enumerate(grouped(runs, lambda run: run["label"]).items()):
        curves = np.array([*zip_longest(*(curve(run, name) for run in seeds), fillvalue=np.nan)])
        mean = curves.mean(1)
        (known,) = np.nonzero(np.isfinite(mean))
        if len(seeds) > 1:
            axis.plot(known + 1, curves[known], color=chosen[label]["color"], linewidth=0.8, alpha=0.3)
        step = max(1, len(known) // MARKED)
        style: dict[str, Any] = {**chosen[label], "markersize": 4, "markevery": (number % step, step)}
        axis.plot(known + 1, mean[known], **style, linewidth=1.3, label=label)
        shown.append(mean[known])
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    scale(axis, name, shown)


def scale(axis: Axes, name: str, curves: Sequence[NDArray[np.float64]]) -> None:
    """Makes kappa's axis logarithmic, also below zero; fits a metric's axis to the last half of a curve."""
    values = np.concatenate([values[len(values) // 2 :] for values in curves])
    if name == "kappa" and values.size:
        if values.min() > 0:
            axis.set_yscale("log")
            tidy(axis, log="y")
        else:
            axis.set_yscale("symlog", linthresh=1.0)
            axis.yaxis.set_major_locator(SymmetricalLogLocator(base=100, linthresh=1.0))
            axis.yaxis.set_minor_locator(NullLocator())
    elif name.rpartition("_")[2] in LEADING and values.size:
        low, high = np.quantile(values, (0.25, 0.75))
        reach = 3 * (high - low) + 0.02 * abs(high)  # a run that failed is not shown, the others are
        bottom, top = max(values.min(), low - reach), min(values.max(), high + reach)
        axis.set_ylim(bottom - 0.1 * reach, top + 0.1 * reach)


def curve(run: Run, name: str) -> NDArray[np.float64]:
    """Returns a quantity by epoch; nan, which pictures leave out, where it was not measured or not finite."""
    values = run["history"].get(name, [])
    return np.array([np.nan if value is None else np.mean(value) for value in values], dtype=np.float64)


def at(run: Run, name: str, index: int) -> float:
    """Returns a quantity after an epoch; nan where it was not finite, or the run is not there yet."""
    values = curve(run, name)
    return float(values[index]) if index < len(values) else float("nan")


def plot_boxes(runs: Sequence[Run]) -> Figure | None:
    """Draws the spread over the samples after the last epoch; None if nothing has a value per sample."""
    names = [name for name, values in runs[0]["history"].items() if isinstance(values[-1], list)]
    runs = [run for run in runs if names and isinstance(run["history"].get(names[0], [None])[-1], list)]
    if not runs:
        return None
    chosen = looks(run["label"] for run in fewest(runs))
    columns = min(3, len(names))
    rows = -(-len(names) // columns)
    figure, axes = panels(rows, columns, WIDTH + 1, rows * (0.8 + 0.28 * len(chosen)), sharey=True)
    for axis, name in zip(axes.flat, names, strict=False):
        own = grouped(runs, lambda run: run["label"])
        samples = [np.concatenate([run["history"][name][-1] for run in own[label]]) for label in chosen]
        style = {"medianprops": {"color": "black"}, "flierprops": {"markersize": 3}, "widths": 0.6}
        style |= {"orientation": "horizontal", "manage_ticks": False, "patch_artist": True}
        boxes = axis.boxplot(samples, **style)
        for box, look in zip(boxes["boxes"], chosen.values(), strict=True):
            box.set(facecolor=look["color"], alpha=0.6)
        axis.set_xlabel(title(name))
        tidy(axis)
    axes[0, 0].set_yticks(range(1, len(chosen) + 1), list(chosen))
    axes[0, 0].invert_yaxis()  # the first on top
    return figure
