"""The picture of the benchmark, from its JSON: time and peak memory relative to the plain step.

python -m recipes.benchmark --plot runs/benchmark/benchmark.json
"""

from collections.abc import Mapping
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from recipes.shared.pictures import SERIES, legend_above, looks, panels, tidy

TICKS = (0.8, 0.9, 1, 1.1, 1.25, 1.5, 2, 3, 4, 6, 8, 12, 16)
QUANTITIES = {"ratio": "time of a step", "memory": "peak memory of a step"}


def plot(results: Mapping[str, Any]) -> Figure:
    """A line per task, a mark per candidate: left the time with quartiles, right the memory."""
    rows = results["runs"]
    labels = list(dict.fromkeys(label for row in rows for label in measured(row)))[:SERIES]
    chosen = looks(labels)
    figure, axes = panels(1, 2, 9, 1.4 + 0.42 * len(rows), sharey=True)
    for axis, (quantity, what) in zip(axes[0], QUANTITIES.items(), strict=True):
        for line, row in enumerate(rows):
            own = {label: result for label, result in measured(row).items() if quantity in result}
            for label in (label for label in labels if label in own):
                # Apart from each other, so that equal ones are seen; the same place in every line.
                place = line + 0.6 * (labels.index(label) + 0.5) / len(labels) - 0.3
                draw(axis, own[label], quantity, place, chosen[label], label)
        axis.axvline(1, color="black", linewidth=0.8)
        axis.set_xlabel(f"{what} (times that of the plain step)")
        tidy(axis)
        axis.set_xscale("log")
        low, high = axis.get_xlim()
        shown = [tick for tick in TICKS if low <= tick <= high]
        axis.set_xticks(shown, [f"{tick:g}" for tick in shown])
        axis.set_xticks([], minor=True)
    axes[0, 0].set_yticks(range(len(rows)), [row["task"] for row in rows])
    axes[0, 0].set_ylim(len(rows) - 0.5, -0.5)
    legend_above(figure, axes[0, 0], 4)
    return figure


def measured(row: Mapping[str, Any]) -> dict[str, Any]:
    """The candidates that were not refused, without the plain step, which is the line at 1."""
    found = row["candidates"].items()
    return {label: result for label, result in found if "ratio" in result and label != "plain"}


def draw(
    axis: Axes, result: Mapping[str, Any], quantity: str, place: float, look: dict[str, str], label: str
) -> None:
    """One mark, of a time with its quartiles."""
    axis.plot(result[quantity], place, **look, linestyle="", markersize=5, label=label)  # type: ignore[arg-type]
    if quantity == "ratio":
        axis.plot(result["quartiles"], (place, place), color=look["color"], linewidth=1.4)
