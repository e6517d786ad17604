"""Measures how flat every layer of a trained network is, and draws kappa by layer and by epoch.

    python -m recipes.train quickstart --optimizer sgd fam --mode proximal --keep 2 --out runs/kept
    python -m recipes.flatness runs/kept/quickstart/*/seed0

A layer with a small kappa is flat. kappa has Gauss-Newton curvature, on the first training samples. If a run
has kept networks of several epochs, a second panel shows kappa by epoch, for the first such run.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.table import Table

from fam_optim import layer_flatness
from recipes.engine.batches import first, ordered
from recipes.engine.loop import Conditions
from recipes.engine.optimizers import settings
from recipes.engine.task import Source
from recipes.engine.training import train
from recipes.shared.command import COMMON, Options, Recipe, fresh, out
from recipes.shared.pictures import SERIES, legend_above, looks, panels, tidy
from recipes.shared.results import grouped
from recipes.shared.tables import pivot
from recipes.tasks import Trained, load_task, trained


def runs_asked(options: Options) -> list[Trained]:
    """Returns the runs of the command line; a smoke test without any trains two, for two epochs."""
    folders = options.runs
    if not folders and options.smoke:
        task, folders = load_task("quickstart"), []
        for optimizer in ("sgd", "fam"):
            conditions = Conditions(0, 2, task.batch_size, Source(smoke=True), keep=1)
            folders.append(fresh(out(options) / "runs" / optimizer / "seed0"))
            train(task, settings(task, optimizer, {}), conditions, folders[-1])
    if not folders:
        raise ValueError(
            "expected the folder of one run or more, such as runs/quickstart/fam/seed0, or --plot"
        )
    return [trained(folder, options.data) for folder in folders]


def measure(options: Options) -> Iterator[dict[str, Any]]:
    """Yields one row per run, epoch and layer."""
    for run in runs_asked(options):
        batches = ordered(first(run.data.train, run.task.kappa_samples), run.config["batch_size"])
        of = {"task": run.config["task"], "label": run.label, "seed": run.config["seed"]}
        for epoch, model in run.networks.items():
            kappas = layer_flatness(model, run.task.loss, batches, n_samples=4)
            yield from ({**of, "epoch": epoch, "layer": layer, "kappa": k} for layer, k in kappas.items())


def name(row: Mapping[str, Any]) -> str:
    """Returns the label and the seed of a row's run."""
    return f"{row['label']}, seed {row['seed']}"


def ends(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the rows of every run's last epoch."""
    return [r for own in grouped(rows, name).values() for r in own if r["epoch"] == own[-1]["epoch"]]


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """Makes a table with a row per layer and a column per run."""
    line, cell = (lambda row: (row["layer"],)), (lambda row: f"{row['kappa']:.4g}")
    return pivot(["layer"], ends(rows), line, name, cell, title="kappa after the last epoch")


def plot(results: Mapping[str, Any]) -> Figure:
    """Draws kappa after the last epoch, and beside it kappa by epoch of the first run with several epochs."""
    last = dict([*grouped(ends(results["runs"]), name).items()][:SERIES])
    layers = list(dict.fromkeys(row["layer"] for own in last.values() for row in own))
    runs = grouped(results["runs"], name).values()
    course = next((rows for rows in runs if rows[0]["epoch"] < rows[-1]["epoch"]), None)
    columns = 2 if course else 1
    figure, axes = panels(1, columns, 1.5 + 4 * columns, 1.4 + 0.3 * max(8, len(layers)))
    bars, height = axes[0, 0], 0.8 / len(last)
    for number, (label, look) in enumerate(looks(last).items()):
        above = height * (number - (len(last) - 1) / 2)
        places = [layers.index(row["layer"]) + above for row in last[label]]
        bars.barh(places, [row["kappa"] for row in last[label]], height, color=look["color"], label=label)
    bars.set_yticks(range(len(layers)), layers)
    bars.set_ylim(len(layers) - 0.5, -0.5)
    bars.set_xlabel("kappa (in the unit of the loss)")
    tidy(bars, "after the last epoch", log="x")
    if course:
        draw_course(axes[0, 1], course)
    legend_above(figure, bars, 3)
    return figure


def draw_course(axis: Any, rows: Sequence[dict[str, Any]]) -> None:
    """Draws kappa by epoch, of the layers with the largest kappa at the end (eight at most)."""
    by_layer = grouped(rows, lambda row: row["layer"])
    shown = sorted(by_layer, key=lambda layer: -by_layer[layer][-1]["kappa"])[:SERIES]
    for layer, look in looks(shown).items():
        epochs, kappas = zip(*((row["epoch"], row["kappa"]) for row in by_layer[layer]), strict=True)
        axis.plot(epochs, kappas, **look, markersize=4)
        axis.annotate(f" {layer}", (epochs[-1], kappas[-1]), fontsize=7, color=look["color"])
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set(xlabel="epoch (number)", ylabel="kappa (in the unit of the loss)")
    tidy(axis, f"{name(rows[0])}, by layer", log="y")


OF_RUNS: dict[str, dict[str, Any]] = {
    "runs": {"nargs": "*", "type": Path, "help": "folders such as runs/quickstart/fam/seed0"},
    "--data": COMMON["--data"],
}
main = Recipe("flatness", __doc__, measure, table, plot, OF_RUNS).main

if __name__ == "__main__":
    main()
