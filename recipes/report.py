"""Turn run folders into one small JSON, a table and pictures.

    python -m recipes.report runs/cifar10                                # into runs/cifar10/report.*
    python -m recipes.report runs/cifar10 --out recipes/results/cifar10  # ... somewhere else
    python -m recipes.report recipes/results/cifar10.json                # the same from the JSON alone

The table has, per task and optimizer, mean and standard deviation over the seeds of what was measured after
the last epoch, and the leading metric at the epoch that was best on validation data, where there are any.
"""

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from recipes.engine.optimizers import OPTIMIZERS
from recipes.engine.pictures import plot_boxes, plot_curves
from recipes.engine.run_folder import RunFolder
from recipes.engine.task import mean
from recipes.shared.results import load, markdown, save

Run = dict[str, Any]


def collect(folder: Path) -> dict[str, Any]:
    """Everything that the runs below a folder have measured, without their checkpoints."""
    runs = []
    for config in folder.rglob("config.json"):
        run = RunFolder(config.parent)
        if records := run.epochs():
            environment = run.read("environment.json")
            runs.append(
                {
                    **run.read("config.json"),
                    "label": config.parent.parent.name,
                    "step_time": run.read("step_time.json"),
                    "history": columns(records),
                }
            )
    if not runs:
        raise FileNotFoundError(f"no finished epoch of any run below {folder}")
    return {"recipe": "train", "environment": environment, "runs": sorted(runs, key=order)}


def order(run: Run) -> tuple[Any, ...]:
    """Plain optimizers first, FAM last, each by its strength."""
    chosen = run["settings"]
    strength = (chosen.get("detach_hessian", False), chosen.get("lam", chosen.get("rho", 0)))
    return run["task"], OPTIMIZERS.index(chosen["optimizer"]), *strength, run["label"], run["seed"]


def columns(records: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """One list per quantity instead of one dict per epoch; None where an epoch did not measure it."""
    names = dict.fromkeys(name for record in records for name in record)
    return {name: [record.get(name) for record in records] for name in names}


def groups(runs: Sequence[Run]) -> dict[tuple[str, str], list[Run]]:
    """The runs that differ in their seed alone."""
    grouped: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        grouped.setdefault((run["task"], run["label"]), []).append(run)
    return grouped


def table(runs: Sequence[Run]) -> Table:
    """One row per task, optimizer and epoch that was asked to be evaluated; valid Markdown."""
    names = [name for name in runs[0]["history"] if name not in ("epoch", "train_loss")]
    validated = next((name for name in names if name.startswith("validation_")), None)
    shown = [name for name in names if name == validated or not name.startswith("validation_")]
    lead = shown[1] if validated else shown[0]
    best = [f"{lead}, best validation"] if validated else []
    result = Table("task", "optimizer", "seeds", "epoch", *shown, *best, "step time", box=box.MARKDOWN)
    for (task, label), group in groups(runs).items():
        for number in evaluated(group[0]):
            cells = [summary(name, [at(run, name, number) for run in group]) for name in shown]
            if validated:
                chosen = [at(run, lead, best_epoch(run, validated)) for run in group]
                cells.append(summary(lead, chosen))
            cost = statistics.fmean(run["step_time"]["median"] for run in group)
            epoch = str(group[0]["history"]["epoch"][number])
            result.add_row(task, label, str(len(group)), epoch, *cells, f"{cost:.2f}x")
    return result


def evaluated(run: Run) -> list[int]:
    """Indices of the epochs that the table shows: those that the task asks for, otherwise the last."""
    history = run["history"]
    metric = next((name for name in history if name not in ("epoch", "train_loss", "kappa")), "kappa")
    indices = [index for index, value in enumerate(history[metric]) if value is not None]
    return indices[-1:] if len(indices) == len(history[metric]) else indices


def at(run: Run, name: str, index: int) -> float:
    """A quantity after an epoch as one number; nan where it was not finite, or the run is not there yet."""
    values = run["history"].get(name, [])
    value = values[index] if index < len(values) else None
    return float("nan") if value is None else mean(value)


def best_epoch(run: Run, name: str) -> int:
    """Index of the first epoch with the best value: the highest accuracy."""
    values = [at(run, name, index) for index in range(len(run["history"][name]))]
    return values.index(max(values))


def summary(name: str, values: Sequence[float]) -> str:
    """Mean and standard deviation, such as "0.96 ± 0.02"; of an accuracy the maximum too."""
    text = f"{statistics.fmean(values):.4g}"
    if len(values) > 1:
        text += f" ± {statistics.stdev(values):.2g}"
    if len(values) > 1 and name.endswith("accuracy"):
        text += f" (max {max(values):.4g})"
    return text


def report(results: dict[str, Any], stem: Path, console: Console) -> None:
    """Print the table, and write it and the pictures beside the JSON."""
    console.print(table(results["runs"]))
    stem.with_suffix(".md").write_text(markdown(table(results["runs"])))
    plot_curves(results["runs"], stem.with_name(f"{stem.name}-curves.png"))
    plot_boxes(results["runs"], stem.with_name(f"{stem.name}-boxes.png"))
    console.print(f"{stem}.json, .md and pictures written")


def main(arguments: Sequence[str] | None = None) -> None:
    """Collect, save, print, draw."""
    parser = argparse.ArgumentParser(
        prog="python -m recipes.report", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("source", type=Path, help="a folder with runs, or the JSON of an earlier report")
    parser.add_argument("--out", type=Path, help="stem of the files, such as recipes/results/cifar10")
    options = parser.parse_args(arguments)
    source: Path = options.source
    stem: Path = options.out or (source / "report" if source.is_dir() else source.with_suffix(""))
    try:
        results = collect(source) if source.is_dir() else load(source)
    except FileNotFoundError as error:
        sys.exit(str(error))
    if source.is_dir():
        save(stem.with_suffix(".json"), results)
    report(results, stem, Console(width=200))


if __name__ == "__main__":
    main()
