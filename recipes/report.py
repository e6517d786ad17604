"""Turns runs of recipes.train into tables, pictures and one JSON file.

    python -m recipes.report runs/cifar10                                # into runs/cifar10/report.*
    python -m recipes.report recipes/results/cifar10.json                # the same, from the JSON file alone

A task's table has what was measured after the last epoch, and the leading metric at the epoch that was best
on validation data. An experiment of the paper has a second table, with the paper's numbers.
"""

import statistics
from collections.abc import Sequence
from itertools import chain
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from recipes.engine.optimizers import OPTIMIZERS
from recipes.engine.pictures import at, curve, plot_boxes, plot_curves, title
from recipes.engine.run_folder import RunFolder
from recipes.paper.comparison import compare
from recipes.shared.command import in_a_sentence, parser
from recipes.shared.pictures import save as save_picture
from recipes.shared.results import grouped, load, save
from recipes.shared.tables import console as make_console
from recipes.shared.tables import markdown, show, summary
from recipes.shared.tables import table as make_table

Run = dict[str, Any]


def collect(folder: Path) -> dict[str, Any]:
    """Returns what the runs below a folder have measured; smoke tests are left out if there are real runs."""
    found: list[Run] = []
    for config in folder.rglob("config.json"):
        run = RunFolder(config.parent)
        if records := run.epochs():  # an epoch has None for what it did not measure
            history = {name: [r.get(name) for r in records] for name in dict.fromkeys(chain(*records))}
            measured = {"step_time": run.read("step_time.json"), "history": history}
            found.append({**run.read("config.json"), "label": config.parent.parent.name, **measured})
            environment = run.read("environment.json")
    if not found:
        raise ValueError(f"no finished epoch of any run below {folder}")
    runs = [run for run in found if not run["smoke"]] or found
    return {"recipe": "train", "environment": environment, "runs": sorted(runs, key=order)}


def order(run: Run) -> tuple[Any, ...]:
    """Returns a run's sort key: plain optimizers come first and FAM last, each in order of its strength."""
    chosen = run["settings"]
    strength = (chosen.get("detach_hessian", False), chosen.get("lam", chosen.get("rho", 0)))
    return run["task"], OPTIMIZERS.index(chosen["optimizer"]), *strength, run["label"], run["seed"]


def tables(runs: Sequence[Run]) -> list[Table]:
    """Makes a table per task, and a second one with the paper's numbers if the paper has any."""
    found = []
    for task, own in grouped(runs, itemgetter("task")).items():
        found += [table(task, own), None if own[0]["smoke"] else compare(task, own)]
    return [*filter(None, found)]


def table(task: str, runs: Sequence[Run]) -> Table:
    """Makes a task's table, with a row per optimizer and per epoch that `evaluated` returns."""
    known = dict.fromkeys(name for run in runs for name in run["history"])
    names = [name for name in known if name not in ("epoch", "train_loss")]
    validated = next((name for name in names if name.startswith("validation_")), None)
    shown = [name for name in names if name == validated or not name.startswith("validation_")]
    lead = shown[1] if validated and len(shown) > 1 else shown[0]
    heads = ["optimizer", "seeds", "epoch", *map(title, shown)]
    heads += [f"{title(lead)}, best validation", "step time"] if validated else ["step time"]
    numbers = "mean ± standard deviation over the seeds; " if len({run["seed"] for run in runs}) > 1 else ""
    smoke = ", a smoke test and no result" if runs[0]["smoke"] else ""
    caption = f"{task}{smoke} ({numbers}step time relative to the plain step)"
    result = make_table(*heads, title=caption)
    for label, group in grouped(runs, lambda run: run["label"]).items():  # they differ only in their seed
        for number in evaluated(group[0]):
            cells = [summary(name, [at(run, name, number) for run in group]) for name in shown]
            if validated:  # a value that is not finite counts as the lowest; of equal ones the first
                best_epochs = [np.nan_to_num(curve(run, validated), nan=-np.inf).argmax() for run in group]
                chosen = [at(run, lead, int(e)) for run, e in zip(group, best_epochs, strict=True)]
                cells.append(summary(lead, chosen))
            cost = statistics.fmean(run["step_time"]["median"] for run in group)
            epoch = str(group[0]["history"]["epoch"][number])
            result.add_row(label, str(len(group)), epoch, *cells, f"{cost:.2f}x")
    return result


def evaluated(run: Run) -> list[int]:
    """Returns the indices of the epochs with all metrics if only some have them, otherwise the last index."""
    history = run["history"]
    metrics = [name for name in history if name not in ("epoch", "train_loss", "kappa")] or ["kappa"]
    rarest = min(metrics, key=lambda name: sum(value is not None for value in history[name]))
    indices = [index for index, value in enumerate(history[rarest]) if value is not None]
    return indices[-1:] if len(indices) == len(history[rarest]) else indices


def report(results: dict[str, Any], stem: Path, console: Console) -> None:
    """Prints the tables, and writes them and the pictures beside the JSON."""
    found = tables(results["runs"])
    show(console, *found)
    stem.with_suffix(".md").write_text(markdown(*found))
    save_picture(plot_curves(results["runs"]), stem.with_name(f"{stem.name}-curves.png"))
    if boxes := plot_boxes(results["runs"]):
        save_picture(boxes, stem.with_name(f"{stem.name}-boxes.png"))
    console.print(f"{stem}.json, .md and pictures written", soft_wrap=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Collects what the runs have measured, and saves, prints and draws it."""
    reader = parser("report", __doc__)
    reader.add_argument("source", type=Path, help="a folder with runs, or the JSON of an earlier report")
    reader.add_argument(
        "--out", type=Path, help="path of the files without their endings (default: beside SOURCE)"
    )
    options = reader.parse_args(arguments)
    source: Path = options.source
    stem: Path = options.out or (source / "report" if source.is_dir() else source.with_suffix(""))
    with in_a_sentence("report"):
        if source.is_dir():
            save(stem.with_suffix(".json"), collect(source))
        results = load(stem.with_suffix(".json") if source.is_dir() else source)  # rounded, as it was saved
        if results.get("recipe") != "train":
            raise ValueError(f"{source}: expected what recipes.report has saved, got something else")
        report(results, stem, make_console())


if __name__ == "__main__":
    main()
