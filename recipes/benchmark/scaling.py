"""How the cost of kappa grows with a last layer: its classes d, its inputs m and the rows N of a batch.

    python -m recipes.benchmark.scaling                       # table, JSON and picture in runs/scaling
    python -m recipes.benchmark.scaling --smoke
    python -m recipes.benchmark.scaling --plot results.json   # redraw

One of the three sizes grows, the others stay. Timed is the gradient of ``loss + kappa`` in the layer's
weights and inputs, forward included, in alternation with the gradient of the loss alone; memory is the peak.
The exponents are fitted to the largest sizes, and stand beside those that the operations predict:

                  time                memory
    exact         N m d               N m + d m + N d    closed form of the softmax; by pairs of classes, in
                                                         d d (N + m), where they are few
    hutchinson    N m d               N m + d m + N d    a probe is a product of the layer's own size
    full          d m  times  N m d   d m (d m + N d)    forms the Hessian by d m products, whose graphs stay

An exponent below the prediction is a size at which other terms, or the calls themselves, still count.
"""

import argparse
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # draws to files, needs no display

import matplotlib.pyplot as plt
import numpy as np
import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn.functional import cross_entropy

from fam_optim import observe, relative_flatness
from recipes.benchmark.memory import alive_bytes, peak_bytes
from recipes.shared.results import CPU, load, record, save

FITTED = 3  # the largest sizes, to which an exponent is fitted
HEAD = {"d": (4096, 512, 256), "m": (512, 4096, 256), "N": (512, 512, 4096)}
TINY = {"d": (64, 16, 1024), "m": (4, 256, 2048), "N": (8, 8, 16384)}
# mode -> the largest (d, m, N) of each sweep, whose own size halves from there so many times; the exponents
# of time and memory
LINEAR = {"d": (1, 1), "m": (1, 1), "N": (1, 1)}
SWEEPS = {
    "exact": (HEAD, 5, LINEAR),
    "hutchinson": (HEAD, 5, LINEAR),
    "full": (TINY, 4, {"d": (2, 2), "m": (2, 1), "N": (1, 1)}),
}
COLOURS = {"exact": "#e69f00", "hutchinson": "#7b5ea7", "full": "#0072b2", "plain": "#555555"}


def gradient(mode: str, sizes: Sequence[int]) -> Any:
    """A call that computes the gradient of ``loss + kappa`` (of the loss alone for "plain")."""
    d, m, n = sizes
    torch.manual_seed(0)
    layer = nn.Linear(m, d)
    inputs, targets = torch.randn(n, m, requires_grad=True), torch.randint(0, d, (n,))

    def call() -> None:
        with observe(layer) as observed:
            loss = cross_entropy(layer(inputs), targets)
        if mode != "plain":
            loss = loss + relative_flatness(loss, observed, mode=mode)
        torch.autograd.grad(loss, [layer.weight, inputs])

    return call


def sweep(mode: str, letter: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per size of the letter, the smallest first."""
    largest, count, _ = SWEEPS[mode]
    rows = []
    for halvings in range(1 if options.smoke else count, -1, -1):
        shift = halvings + (4 if options.smoke else 0)
        sizes = [
            max(2, size >> (shift if name == letter else 0))
            for name, size in zip("dmN", largest[letter], strict=True)
        ]
        calls = {name: gradient(name, sizes) for name in ("plain", mode)}
        seconds: dict[str, list[float]] = {name: [] for name in calls}
        for round_ in range(options.rounds + 1):  # the first warms up
            for name in list(calls)[:: 1 if round_ % 2 else -1]:
                begin = time.perf_counter()
                calls[name]()
                if round_:
                    seconds[name].append(time.perf_counter() - begin)
        others = alive_bytes(CPU)
        rows.append(
            {
                "mode": mode,
                "swept": letter,
                **dict(zip("dmN", sizes, strict=True)),
                "seconds": statistics.median(seconds[mode]),
                "plain_seconds": statistics.median(seconds["plain"]),
                "bytes": peak_bytes(calls[mode], CPU) - others,
                "plain_bytes": peak_bytes(calls["plain"], CPU) - others,
            }
        )
    return rows


def exponent(rows: Sequence[dict[str, Any]], quantity: str) -> float:
    """p of ``quantity = c size^p``, by least squares on the largest sizes."""
    sizes = [row[row["swept"]] for row in rows[-FITTED:]]
    values = [row[quantity] for row in rows[-FITTED:]]
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def groups(runs: Sequence[dict[str, Any]]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """The rows of each sweep."""
    grouped: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for run in runs:
        grouped.setdefault((run["mode"], run["swept"]), []).append(run)
    return grouped


def table(runs: Sequence[dict[str, Any]]) -> Table:
    """Fitted exponents beside the predicted one, and the ratio to the plain gradient at the largest size."""
    columns = ("mode", "grows", "time", "predicted", "plain time", "memory", "predicted", "plain memory")
    result = Table(*columns, "time / plain", "memory / plain", box=box.MARKDOWN)
    for (mode, letter), rows in groups(runs).items():
        last = rows[-1]
        seconds, plain_seconds, peak, plain_peak = (
            f"{exponent(rows, quantity):.2f}"
            for quantity in ("seconds", "plain_seconds", "bytes", "plain_bytes")
        )
        in_time, in_memory = map(str, SWEEPS[mode][2][letter])
        result.add_row(
            *(mode, f"{letter} to {last[letter]}"),
            *(seconds, in_time, plain_seconds, peak, in_memory, plain_peak),
            f"{last['seconds'] / last['plain_seconds']:.2f}",
            f"{last['bytes'] / last['plain_bytes']:.2f}",
        )
    return result


def plot(source: Path, target: Path) -> None:
    """Draw time above and memory below, a column per size that grows."""
    grouped = groups(load(source)["runs"])
    letters = list(dict.fromkeys(letter for _, letter in grouped))
    figure, axes = plt.subplots(2, len(letters), figsize=(3.4 * len(letters), 6), squeeze=False)
    for column, letter in zip(axes.T, letters, strict=True):
        for axis, quantity in zip(column, ("seconds", "bytes"), strict=True):
            for mode, colour in COLOURS.items():
                rows = grouped.get((mode if mode != "plain" else "exact", letter), [])
                name = quantity if mode != "plain" else f"plain_{quantity}"
                if rows:
                    sizes = [row[letter] for row in rows]
                    label = f"{mode} ({exponent(rows, name):.2f})"
                    axis.plot(
                        sizes, [row[name] for row in rows], "o-", color=colour, markersize=3, label=label
                    )
            axis.set(xscale="log", yscale="log", xlabel=letter)
            axis.set_title(f"{quantity} by {letter}, with exponents", loc="left", fontsize=9)
            axis.legend(frameon=False, fontsize=7)
            axis.grid(alpha=0.25)
            axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(target, dpi=120)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, save, print the table, draw the picture."""
    parser = argparse.ArgumentParser(
        prog="python -m recipes.benchmark.scaling", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/scaling"))
    parser.add_argument("--plot", type=Path, metavar="JSON", help="redraw the picture of these results only")
    parser.add_argument("--smoke", action="store_true", help="small sizes, two rounds: a test, no result")
    options = parser.parse_args(arguments)
    if options.plot:
        plot(options.plot, options.plot.with_suffix(".png"))
        return
    if options.smoke:
        options.rounds = 2
    torch.set_num_threads(options.threads)
    begin = time.perf_counter()
    letters = "d" if options.smoke else "dmN"
    runs = [row for mode in SWEEPS for letter in letters for row in sweep(mode, letter, options)]
    path = options.out / "scaling.json"
    configuration = {"rounds": options.rounds, "threads": options.threads, "smoke": options.smoke}
    save(path, record("scaling", configuration, time.perf_counter() - begin, runs))
    Console(width=140).print(table(runs))
    plot(path, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
