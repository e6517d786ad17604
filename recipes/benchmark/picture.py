"""The picture of the benchmark, from its JSON: time and peak memory relative to the plain step.

python -m recipes.benchmark --plot runs/benchmark/benchmark.json
"""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from recipes.shared.pictures import (
    BLUE,
    BROWN,
    GREEN,
    GREY,
    ORANGE,
    RED,
    SKY,
    VIOLET,
    legend_above,
    panels,
    tidy,
)

COLOURS = {
    "FAM exact": ORANGE,
    "FAM exact, detached": RED,
    "FAM hutchinson": VIOLET,
    "FAM hutchinson, detached": "#b8a3d9",
    "FAM full": BROWN,
    "SAM": BLUE,
    "ASAM": SKY,
    "vectorised Hessian": GREY,
    "autograd-loop Hessian": "#999999",
    "curvlinops trace (value only)": GREEN,
    "PyHessian trace (value only)": "#8fd3b6",
}
OTHERS = ("#7a1f4b", "#1b9e9e", "#b2df8a", "#cc79a7")  # of candidates that came later
TICKS = [2.0**k for k in range(-2, 14)]
GAP = 1.5  # lines between two tasks


def plot(results: Mapping[str, Any]) -> Figure:
    """A line of its own for every candidate of every task: left the time with quartiles, right the memory."""
    rows = results["runs"]
    colours = chosen(rows)
    lines = sum(len(measured(row)) + GAP for row in rows)
    figure, axes = panels(1, 2, 9, 1.6 + 0.1 * lines, sharey=True)
    for axis, quantity in zip(axes[0], ("ratio", "memory"), strict=True):
        centres = draw(axis, rows, quantity, colours)
        what = "time" if quantity == "ratio" else "peak memory"
        axis.set_xlabel(f"{what} of a step (times that of the plain step)")
    axes[0, 0].set_yticks(centres, [row["task"] for row in rows])
    axes[0, 0].set_ylim(lines, -GAP)
    legend_above(figure, axes[0, 0], 4)
    return figure


def measured(row: Mapping[str, Any]) -> dict[str, Any]:
    """The candidates that were not refused, without the plain step, which is the line at 1."""
    found = row["candidates"].items()
    return {label: result for label, result in found if "ratio" in result and label != "plain"}


def chosen(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """A colour for every candidate."""
    new = dict.fromkeys(label for row in rows for label in measured(row) if label not in COLOURS)
    return COLOURS | dict(zip(new, OTHERS * len(new), strict=False))


def draw(
    axis: Axes, rows: Sequence[Mapping[str, Any]], quantity: str, colours: Mapping[str, str]
) -> list[float]:
    """Draw one mark per candidate and task. Returns where the tasks are."""
    centres, line = [], 0.0
    for row in rows:
        own = [(label, result) for label in colours if (result := measured(row).get(label))]
        centres.append(line + (len(own) - 1) / 2)
        for label, result in own:
            axis.plot(result[quantity], line, "o", color=colours[label], markersize=4, label=label)
            if quantity == "ratio":
                axis.plot(result["quartiles"], (line, line), color=colours[label], linewidth=1.4)
            line += 1
        line += GAP
    axis.axvline(1, color="black", linewidth=0.8)
    tidy(axis)
    axis.set_xscale("log", base=2)
    low, high = axis.get_xlim()
    shown = [tick for tick in TICKS if low <= tick <= high]
    axis.set_xticks(shown, [f"{tick:g}" for tick in shown])
    axis.grid(visible=False, axis="y")
    return centres
