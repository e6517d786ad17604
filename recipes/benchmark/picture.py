"""The picture of the benchmark, from its JSON: time and peak memory relative to the plain step.

python -m recipes.benchmark.picture runs/benchmark/benchmark.json
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # draws to files, needs no display

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from recipes.shared.results import load

COLOURS = {
    "FAM exact": "#e69f00",
    "FAM exact, detached": "#d1495b",
    "FAM hutchinson": "#7b5ea7",
    "FAM hutchinson, detached": "#b8a3d9",
    "FAM full": "#6b4f1d",
    "SAM": "#0072b2",
    "ASAM": "#56b4e9",
    "vectorised Hessian": "#555555",
    "autograd-loop Hessian": "#999999",
    "curvlinops trace (value only)": "#009e73",
    "PyHessian trace (value only)": "#8fd3b6",
}
TICKS = [2.0**k for k in range(-2, 14)]


def plot(source: Path, target: Path) -> None:
    """Draw a line per task: left the ratios of the time with their quartiles, right those of the memory."""
    rows = load(source)["runs"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 1.3 + 0.5 * len(rows)), sharey=True)
    draw(left, rows, "ratio")
    draw(right, rows, "memory")
    left.set_yticks(range(len(rows)), [row["task"] for row in rows], fontsize=8)
    left.invert_yaxis()
    left.set_title("time of a step, plain step = 1", loc="left", fontsize=9)
    right.set_title("peak memory of a step, plain step = 1", loc="left", fontsize=9)
    handles, labels = left.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    figure.legend(unique.values(), unique, loc="upper center", ncols=4, frameon=False, fontsize=8)
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.8 / figure.get_figheight()))
    figure.savefig(target, dpi=120)
    plt.close(figure)


def draw(axis: Axes, rows: Sequence[dict[str, Any]], quantity: str) -> None:
    """Draw one mark per candidate and task; a refused candidate has none."""
    for line, row in enumerate(rows):
        for number, (label, colour) in enumerate(COLOURS.items()):
            found = row["candidates"].get(label, {})
            if quantity not in found:
                continue
            y = line + 0.06 * (number - len(COLOURS) / 2)
            axis.plot(found[quantity], y, "o", color=colour, markersize=4, label=label)
            if quantity == "ratio":
                axis.plot(found["quartiles"], (y, y), color=colour, linewidth=1.2)
    axis.axvline(1, color="black", linewidth=0.8)
    axis.set_xscale("log", base=2)
    low, high = axis.get_xlim()
    shown = [tick for tick in TICKS if low <= tick <= high]
    axis.set_xticks(shown, [f"{tick:g}" for tick in shown], fontsize=8)
    axis.grid(alpha=0.25, axis="x")
    axis.spines[["top", "right"]].set_visible(False)


def main() -> None:
    """Draw the picture beside the JSON."""
    parser = argparse.ArgumentParser(prog="python -m recipes.benchmark.picture")
    parser.add_argument("results", type=Path, help="the JSON that recipes.benchmark wrote")
    path = parser.parse_args().results
    plot(path, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
