"""The pictures of a report: what changed by epoch, and the spread over samples."""

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from recipes.shared.pictures import (
    BLUE,
    BROWN,
    GREEN,
    GREY,
    ORANGE,
    PINK,
    RED,
    SKY,
    VIOLET,
    legend_above,
    panels,
    tidy,
)

Run = dict[str, Any]
COLOURS = {"sgd": GREY, "nesterov": BROWN, "adam": GREEN, "sam": BLUE, "asam": SKY, "fam": ORANGE}
OTHERS = (RED, VIOLET, PINK, "#7a1f4b", "#1b9e9e", "#b2df8a")
WIDTH = 8.2  # inches, about 1,000 pixels: what a README shows
NAMES = {  # of quantities, by the end of their name, with the unit
    "train_loss": "training loss",
    "accuracy": "accuracy (%)",
    "dsc": "DSC (0 to 1)",
    "hd": "HD (voxels)",
    "hd95": "HD95 (voxels)",
    "nll": "NLL (nats)",
    "kappa": "kappa",
}
FEW = 12  # points that are marked
LEADING = ("accuracy", "dsc")  # of the metrics, those that have a panel


def title(name: str) -> str:
    """What an axis or a column says of a quantity, such as "test accuracy (%)"."""
    if name in NAMES:
        return NAMES[name]
    samples, _, metric = name.rpartition("_")
    return f"{samples.replace('_', ' ')} {NAMES.get(metric, metric)}".strip()


def of_task(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """The runs by their task."""
    grouped: dict[str, list[Run]] = {}
    for run in runs:
        grouped.setdefault(run["task"], []).append(run)
    return grouped


def plot_curves(runs: Sequence[Run]) -> Figure:
    """Small multiples, a row or two per task: what was measured by epoch; a faint line per seed."""
    tasks = of_task(runs)
    names = {task: quantities(own) for task, own in tasks.items()}
    most = max(map(len, names.values()))
    columns = 2 if most in (2, 4) else min(3, most)
    rows = {task: -(-len(shown) // columns) for task, shown in names.items()}
    count = sum(rows.values())
    figure, axes = panels(count, columns, WIDTH, 0.6 + 2.3 * count)
    lines = iter(axes)
    for task, own in tasks.items():
        block = [axis for _ in range(rows[task]) for axis in next(lines)]
        for axis, name in zip_longest(block, names[task]):
            if name is None:
                axis.axis("off")
                continue
            draw(axis, own, name, colours(runs))
            unit = f" ({loss_unit(own)})" if name in ("train_loss", "kappa") else ""
            axis.set(xlabel="epoch (number)", ylabel=title(name) + unit)
            tidy(axis, task if axis is block[0] else "")
    legend_above(figure, axes[0, 0], 3)
    return figure


def loss_unit(runs: Sequence[Run]) -> str:
    """The unit of the loss, which is kappa's too: a cross-entropy's, or one minus a Dice coefficient."""
    return "nats" if any("accuracy" in name for run in runs for name in run["history"]) else "Dice loss"


def quantities(runs: Sequence[Run]) -> list[str]:
    """What has a panel: the leading metric of every evaluation set, the training loss, and kappa."""
    known = dict.fromkeys(name for run in runs for name in run["history"])
    leading = [name for name in known if name.rpartition("_")[2] in LEADING]
    tested = [name for name in leading if not name.startswith("validation_")]
    return [*(tested or leading), *(name for name in ("train_loss", "kappa") if name in known)]


def draw(axis: Axes, runs: Sequence[Run], name: str, chosen: Mapping[str, str]) -> None:
    """Draw each optimizer's mean over its seeds, and the seeds themselves, faint."""
    length = max(len(run["history"]["epoch"]) for run in runs)
    epochs = np.arange(1, length + 1)
    for label in dict.fromkeys(run["label"] for run in runs):
        curves = np.stack([curve(run, name, length) for run in runs if run["label"] == label])
        mean = curves.mean(0)
        known = np.isfinite(mean)
        if len(curves) > 1:
            for seed in curves:
                axis.plot(epochs[known], seed[known], color=chosen[label], linewidth=0.8, alpha=0.35)
        marker = "o" if known.sum() <= FEW else ""  # a line through a single point would not be seen
        axis.plot(epochs[known], mean[known], marker=marker, markersize=3, color=chosen[label], label=label)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    if name == "kappa" and all(np.nanmin(curve(run, name, length)) > 0 for run in runs):
        tidy(axis, log="y")


def colours(runs: Sequence[Run]) -> dict[str, str]:
    """A colour per label, the same in every panel, and no colour twice."""
    labels = list(dict.fromkeys(run["label"] for run in runs))
    chosen: dict[str, str] = {}
    for label in labels:
        own = COLOURS.get(label.split("-")[0])
        if own is not None and own not in chosen.values():
            chosen[label] = own
    rest = [label for label in labels if label not in chosen]
    free = [colour for colour in (*OTHERS, *COLOURS.values()) if colour not in chosen.values()]
    if len(rest) > len(free):
        free = [to_hex(colour) for colour in colormaps["turbo"](np.linspace(0.05, 0.95, len(rest)))]
    return chosen | dict(zip(rest, free, strict=False))


def curve(run: Run, name: str, length: int) -> NDArray[np.float64]:
    """A quantity by epoch; nan where it was not measured or not finite, which is left out of the picture."""
    values = run["history"].get(name, [])
    known = [np.nan if value is None else np.mean(value) for value in values]
    return np.array(known + [np.nan] * (length - len(known)), dtype=np.float64)


def plot_boxes(runs: Sequence[Run]) -> Figure | None:
    """The last epoch's spread over the samples, of what has a value per sample; None if nothing has."""
    names = [name for name, values in runs[0]["history"].items() if isinstance(values[-1], list)]
    runs = [run for run in runs if names and isinstance(run["history"].get(names[0], [None])[-1], list)]
    if not runs:
        return None
    chosen = colours(runs)
    columns = min(3, len(names))
    rows = -(-len(names) // columns)
    figure, axes = panels(rows, columns, WIDTH + 1, rows * (0.8 + 0.28 * len(chosen)), sharey=True)
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
        axis.set_xlabel(title(name))
        tidy(axis)
    axes[0, 0].set_yticks(range(1, len(chosen) + 1), list(chosen))
    axes[0, 0].invert_yaxis()  # the first on top
    figure.tight_layout()
    return figure
