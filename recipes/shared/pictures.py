"""Gives all pictures one look: a method has the same colour and marker on every page."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # pictures are drawn to files and need no display

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from numpy.typing import NDArray

from recipes.shared.results import grouped

DPI = 120
SERIES = 8  # labels in one picture, at most
# Colours that people with any kind of colour vision can tell apart (Okabe and Ito, 2008, and darker ones).
GREY, BLUE, SKY, ORANGE, RED = "#555555", "#0072b2", "#56b4e9", "#e69f00", "#d1495b"
GREEN, PINK, VIOLET, BROWN, TEAL = "#009e73", "#cc79a7", "#7b5ea7", "#8c6d31", "#1b9e9e"
# A word of the label, in lower case -> the method's colour and marker. The first match counts.
METHODS = {
    "proximal": (RED, "o"),
    "looksam": (SKY, "v"),
    "asam": (TEAL, "<"),
    "sam": (BLUE, "^"),
    "decay": (BROWN, "X"),
    "smoothing": ("#b8860b", "p"),
    "noise": (GREEN, "P"),
    "last but one": (PINK, ">"),
    "hidden": (VIOLET, "D"),
    "gauss-newton": (VIOLET, "D"),
    "hutchinson": (PINK, ">"),
    "fam": (ORANGE, "s"),
    "exact": (ORANGE, "s"),
    "sgd": (GREY, "."),
    "adam": (GREY, "."),
    "nesterov": (GREY, "."),
    "plain": (GREY, "."),
}
OTHER = (TEAL, "h")  # for labels without a match
MARKERS = "o^sDvP>X<p*h."


def looks(labels: Iterable[str]) -> dict[str, dict[str, str]]:
    """Returns every label's colour and marker for matplotlib; labels of one method get shades of a colour."""
    labels = list(dict.fromkeys(labels))
    by_look = grouped(labels, own_look)
    chosen, markers = {}, [m for m in MARKERS if m not in {marker for _, marker in by_look}]
    for (colour, marker), own in by_look.items():
        shades = np.linspace(0.5 if len(own) < 3 else 0.0, 1 if own[1:] else 0.5, len(own))
        for number, label in enumerate(own):
            another = markers.pop(0) if number and markers else marker
            chosen[label] = {"color": mixed(colour, shades[number]), "marker": another}
    return {label: chosen[label] for label in labels}


def own_look(label: str) -> tuple[str, str]:
    """Returns the colour and marker of the label's method."""
    text = label.lower().replace("_", " ")
    return next((look for word, look in METHODS.items() if word in text), OTHER)


def mixed(colour: str, darkness: float) -> str:
    """Returns a shade of the colour: light at darkness 0, the colour itself at 1/2, and dark at 1."""
    other, part = (np.ones(3), 0.5 - darkness) if darkness < 0.5 else (np.zeros(3), darkness - 0.5)
    red, green, blue = np.array(to_rgb(colour)) * (1 - part) + other * part
    return to_hex((red, green, blue))


def panels(
    rows: int, columns: int, width: float, height: float, **options: Any
) -> tuple[Figure, NDArray[Any]]:
    """Returns a figure of so many inches with a grid of axes, ``(rows, columns)``."""
    size: dict[str, Any] = {"figsize": (width, height), "layout": "constrained", "squeeze": False}
    figure, axes = plt.subplots(rows, columns, **size, **options)
    return figure, axes


def tidy(axis: Axes, title: str = "", *, log: str = "") -> None:
    """Removes a panel's box and adds a grid; ``log`` names the logarithmic axes. Call it after drawing."""
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
    """Labels a logarithmic axis at powers of ten; if these are few, also at 2 and 5 times them."""
    if high < 100 * low:
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_minor_formatter(NullFormatter())


def draw_lines(
    axis: Axes, rows: Iterable[Mapping[str, Any]], x: str, y: str, by: str, chosen: Mapping[str, Any]
) -> None:
    """Draws y by x, with a line for each value that the rows have of ``by``, in the look chosen for it."""
    for label, own in grouped(rows, lambda row: row[by]).items():
        xs, ys = ([row[name] for row in own] for name in (x, y))
        axis.plot(xs, ys, **chosen[label], markersize=4, label=label)


def legend_above(figure: Figure, axis: Axes, columns: int) -> None:
    """Draws one legend for all panels, above them, in at most so many columns."""
    handles, labels = axis.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    look: dict[str, Any] = {"loc": "outside upper center", "frameon": False, "fontsize": 9}
    figure.legend(unique.values(), unique, ncols=min(columns, len(unique)), **look)


def save(figure: Figure, target: Path) -> None:
    """Writes a picture to a file, and closes the picture."""
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=DPI)
    plt.close(figure)
