"""The look that all pictures share; they are drawn to files and need no display."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from numpy.typing import NDArray

DPI = 120
# Colours that people with any kind of colour vision can tell apart (Okabe and Ito, 2008, and darker ones).
GREY, BLUE, SKY, ORANGE, RED = "#555555", "#0072b2", "#56b4e9", "#e69f00", "#d1495b"
GREEN, PINK, VIOLET, BROWN = "#009e73", "#cc79a7", "#7b5ea7", "#8c6d31"


def panels(
    rows: int, columns: int, width: float, height: float, **options: Any
) -> tuple[Figure, NDArray[Any]]:
    """A figure of so many inches with a grid of axes, ``(rows, columns)``."""
    figure, axes = plt.subplots(rows, columns, figsize=(width, height), squeeze=False, **options)
    return figure, axes


def tidy(axis: Axes, title: str = "", *, log: str = "") -> None:
    """A panel without a box, with a grid; ``log`` names the logarithmic axes. To be called after drawing."""
    if title:
        axis.set_title(title, loc="left", fontsize=9)
    if "x" in log:
        axis.set_xscale("log")
        label(axis.xaxis, *axis.get_xlim())
    if "y" in log:
        axis.set_yscale("log")
        label(axis.yaxis, *axis.get_ylim())
    axis.tick_params(labelsize=8)
    axis.xaxis.label.set_fontsize(9)
    axis.yaxis.label.set_fontsize(9)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)


def label(axis: Axis, low: float, high: float) -> None:
    """A logarithmic axis: labels at powers of ten, and where these are few at 2 and 5 times them too."""
    if high < 300 * low:
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_minor_formatter(NullFormatter())


def legend_above(figure: Figure, axis: Axes, columns: int) -> None:
    """One legend for all panels, above them, in so many columns; nothing of it is cut off."""
    handles, labels = axis.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    lines = -(-len(unique) // columns)
    figure.legend(
        unique.values(),
        unique,
        loc="upper center",
        ncols=min(columns, len(unique)),
        frameon=False,
        fontsize=9,
    )
    room = (0.12 + 0.19 * lines) / figure.get_figheight()
    figure.tight_layout(rect=(0, 0, 1, 1 - room))


def save(figure: Figure, target: Path) -> None:
    """Write a picture."""
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=DPI)
    plt.close(figure)
