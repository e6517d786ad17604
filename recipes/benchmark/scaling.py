"""Measures how the cost of kappa grows with a last layer's classes d and inputs m, and with the batch size N.

One of the three sizes grows at a time. The gradient of ``loss + kappa`` in the layer's weights and inputs is
timed in turns with that of the loss alone; memory is the peak. The exponents are fitted to the largest sizes.
The predictions count the operations:

                  time                memory
    exact         N m d               N m + d m + N d    closed form of the softmax; by pairs of classes, in
                                                         d d (N + m), where they are few
    hutchinson    N m d               N m + d m + N d    a probe is a product of the layer's own size
    full          d m  times  N m d   d m (d m + N d)    forms the Hessian by d m products, whose graphs stay

Where an exponent is below the prediction, other terms, or the calls themselves, still count at these sizes.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product
from operator import itemgetter
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from rich.table import Table
from torch import nn

from recipes.benchmark.memory import alive_bytes, peak_bytes
from recipes.shared.command import Options, Recipe, positive
from recipes.shared.pictures import draw_lines, legend_above, looks, panels, tidy
from recipes.shared.problem import Problem
from recipes.shared.results import CPU, grouped
from recipes.shared.tables import table as make_table
from recipes.shared.timing import alternate, median

FITTED = 3  # number of sizes, the largest, to which an exponent is fitted
HEAD = {"d": (4096, 512, 256), "m": (512, 4096, 256), "N": (512, 512, 4096)}
TINY = {"d": (64, 16, 1024), "m": (4, 256, 2048), "N": (8, 8, 16384)}
# mode -> the largest (d, m, N) of each sweep, how many times its growing size is halved from there, and the
# predicted exponents of time and memory
LINEAR = {"d": (1, 1), "m": (1, 1), "N": (1, 1)}
SWEEPS = {
    "exact": (HEAD, 5, LINEAR),
    "hutchinson": (HEAD, 5, LINEAR),
    "full": (TINY, 4, {"d": (2, 2), "m": (2, 1), "N": (1, 1)}),
}
LETTERS = {"d": "d, the classes", "m": "m, the inputs", "N": "N, the rows of the batch"}
QUANTITIES = {"seconds": "time (s)", "bytes": "peak memory (bytes)"}


def gradient(mode: str, sizes: Sequence[int]) -> Callable[[], Any]:
    """Returns a call that computes the gradient of ``loss + kappa`` (of the loss alone for "plain")."""
    d, m, n = sizes
    torch.manual_seed(0)
    layer = nn.Linear(m, d)
    problem = Problem(layer, layer, torch.randn(n, m, requires_grad=True), torch.randint(0, d, (n,)))

    def call() -> None:
        loss = problem.loss() if mode == "plain" else sum(problem.penalised(mode=mode))
        torch.autograd.grad(loss, [layer.weight, problem.inputs])  # type: ignore[arg-type]

    return call


def sweep(mode: str, letter: str, options: Options) -> Iterator[dict[str, Any]]:
    """Yields one row per size of the letter, the smallest first."""
    largest, count, _ = SWEEPS[mode]
    for halvings in (5, 4) if options.smoke else range(count, -1, -1):
        sizes = dict(zip("dmN", largest[letter], strict=True))
        sizes[letter] = max(2, sizes[letter] >> halvings)
        calls = {name: gradient(name, [*sizes.values()]) for name in ("plain", mode)}
        seconds = alternate(calls, options.rounds)
        others = alive_bytes(CPU)
        row: dict[str, Any] = {"mode": mode, "swept": letter, **sizes}
        for name, prefix in ((mode, ""), ("plain", "plain_")):
            row[f"{prefix}seconds"] = median(seconds[name])[0]
            row[f"{prefix}bytes"] = peak_bytes(calls[name], CPU) - others
        yield row


def exponent(rows: Sequence[dict[str, Any]], quantity: str) -> float:
    """Returns p of ``quantity = c size^p``, fitted to logarithms at the largest sizes by least squares."""
    sizes = [row[row["swept"]] for row in rows[-FITTED:]]
    values = [row[quantity] for row in rows[-FITTED:]]
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def table(runs: Sequence[dict[str, Any]]) -> Table:
    """Makes a table of fitted and predicted exponents, and the ratio to the plain gradient at the end."""
    columns = ("mode", "grows", "time", "predicted", "plain time", "memory", "predicted", "plain memory")
    result = make_table(*columns, "time / plain", "memory / plain")
    for (mode, letter), rows in grouped(runs, itemgetter("mode", "swept")).items():
        cells, ratios = [], []
        for quantity, predicted in zip(QUANTITIES, SWEEPS[mode][2][letter], strict=True):
            own, plain = (f"{exponent(rows, name):.2f}" for name in (quantity, f"plain_{quantity}"))
            cells += [own, str(predicted), plain]
            ratios.append(f"{rows[-1][quantity] / rows[-1][f'plain_{quantity}']:.2f}")
        result.add_row(mode, f"{letter} to {rows[-1][letter]}", *cells, *ratios)
    return result


def plot(results: Mapping[str, Any]) -> Figure:
    """Draws time above and memory below, a column per size that grows."""
    sweeps = grouped(results["runs"], itemgetter("swept"))
    chosen = looks([*SWEEPS, "plain"])
    figure, axes = panels(2, len(sweeps), 1 + 2.8 * len(sweeps), 5.4, sharex="col")
    for column, (letter, rows) in zip(axes.T, sweeps.items(), strict=True):
        plain = [{**row, "mode": "plain"} for row in rows if row["mode"] == "exact"]
        for axis, (quantity, what) in zip(column, QUANTITIES.items(), strict=True):
            draw_lines(axis, rows, letter, quantity, "mode", chosen)
            draw_lines(axis, plain, letter, f"plain_{quantity}", "mode", chosen)
            axis.set(xlabel=f"{LETTERS[letter]} (number)", ylabel=what)
            tidy(axis, log="xy")
    legend_above(figure, axes[0, 0], len(chosen))
    return figure


def measure(options: Options) -> Iterator[dict[str, Any]]:
    """Yields one row per mode, letter and size."""
    for mode, letter in product(SWEEPS, "d" if options.smoke else "dmN"):
        yield from sweep(mode, letter, options)


OPTIONS: dict[str, dict[str, Any]] = {
    "--rounds": {"type": positive, "default": 7, "help": "timed calls of each size (default: 7)"}
}
main = Recipe("benchmark.scaling", __doc__, measure, table, plot, OPTIONS, {"rounds": 2}).main

if __name__ == "__main__":
    main()
