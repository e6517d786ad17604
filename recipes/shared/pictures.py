"""The look that all pictures share: one colour and marker for a method on all pages, units, no box."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # they are drawn to files and need no display

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
SERIES = 8  # in one picture, at most
# Colours that people with any kind of colour vision can tell apart (Okabe and Ito, 2008, and darker ones).
GREY, BLUE, SKY, ORANGE, RED = "#555555", "#0072b2", "#56b4e9", "#e69f00", "#d1495b"
GREEN, PINK, VIOLET, BROWN, TEAL = "#009e73", "#cc79a7", "#7b5ea7", "#8c6d31", "#1b9e9e"
# A word of the label, in small letters -> the method's colour and marker. The first word in it counts.
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
OTHER = (TEAL, "h")  # of what is not in the list
MARKERS = "o^sDvP>X<p*h."


def looks(labels: Iterable[str]) -> dict[str, dict[str, str]]:
    """Colour and marker of every label, as matplotlib takes them: its method's, in shades for several."""
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
    """Colour and marker of the label's method."""
    text = label.lower().replace("_", " ")
    return next((look for word, look in METHODS.items() if word in text), OTHER)


def mixed(colour: str, darkness: float) -> str:
    """From a light shade at 0 over the colour itself at 1/2 to a dark one at 1."""
    other, part = (np.ones(3), 0.5 - darkness) if darkness < 0.5 else (np.zeros(3), darkness - 0.5)
    red, green, blue = np.array(to_rgb(colour)) * (1 - part) + other * part
    return to_hex((red, green, blue))


def panels(
    rows: int, columns: int, width: float, height: float, **options: Any
) -> tuple[Figure, NDArray[Any]]:
    """A figure of so many inches with a grid of axes, ``(rows, columns)``."""
    size: dict[str, Any] = {"figsize": (width, height), "layout": "constrained", "squeeze": False}
    figure, axes = plt.subplots(rows, columns, **size, **options)
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
    if high < 100 * low:
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_minor_formatter(NullFormatter())


def draw_lines(
    axis: Axes, rows: Iterable[Mapping[str, Any]], x: str, y: str, by: str, chosen: Mapping[str, Any]
) -> None:
    """A line per label, which is the rows' value of ``by``: their quantity y by x, in the label's look."""
    for label, own in grouped(rows, lambda row: row[by]).items():
        xs, ys = ([row[name] for row in own] for name in (x, y))
        axis.plot(xs, ys, **chosen[label], markersize=4, label=label)


def legend_above(figure: Figure, axis: Axes, columns: int) -> None:
    """One legend for all panels, above them, in so many columns."""
    handles, labels = axis.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    look: dict[str, Any] = {"loc": "outside upper center", "frameon": False, "fontsize": 9}
    figure.legend(unique.values(), unique, ncols=min(columns, len(unique)), **look)


def save(figure: Figure, target: Path) -> None:
    """Write a picture."""
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=DPI)
    plt.close(figure)
