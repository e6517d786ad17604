"""The paper on one page: the settings of its experiments with their marks, and its numbers beside ours.

    python -m recipes.paper

The numbers are those of the results that lie beside the recipes.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from recipes.engine import marks
from recipes.paper.comparison import compare
from recipes.paper.numbers import ROWS, STAND_INS
from recipes.shared.results import load, markdown
from recipes.tasks import load_task

RESULTS = Path(__file__).parents[1] / "results"
EXPERIMENTS = tuple(dict.fromkeys(row.experiment for row in ROWS))


def settings() -> Table:
    """A column per experiment."""
    return marks.table([load_task(name) for name in EXPERIMENTS])


def comparisons(folder: Path = RESULTS) -> dict[str, Table]:
    """A table per experiment, of the paper's setting or of the small forms that were run instead."""
    found = [load(path) for path in sorted(folder.glob("*.json"))]
    runs = [run for results in found if results.get("recipe") == "train" for run in results["runs"]]
    tables = {}
    for experiment in EXPERIMENTS:
        names = [experiment, *(task for task, (name, _) in STAND_INS.items() if name == experiment)]
        ran = [name for name in names if any(run["task"] == name for run in runs)]
        for name in ran or [experiment]:
            table = compare(name, [run for run in runs if run["task"] == name])
            assert table is not None
            tables[name] = table
    return tables


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the tables as Markdown, with what each is of."""
    parser = argparse.ArgumentParser(
        prog="python -m recipes.paper", description=(__doc__ or "").split("\n")[0]
    )
    parser.parse_args(arguments)
    print("Settings: P the paper's, C the released code's, O ours\n")
    print(markdown(settings()))
    for name, table in comparisons().items():
        title = table.title
        print(f"{name}: {title}\n")
        print(markdown(table))


if __name__ == "__main__":
    main()
