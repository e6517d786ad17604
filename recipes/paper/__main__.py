"""The paper's numbers beside ours, on one page.

    python -m recipes.paper
    python -m recipes.paper --out recipes/results/paper.md

Ours are those of the results that lie beside the recipes.
"""

from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from recipes.paper.comparison import compare, figure_4
from recipes.paper.numbers import ROWS, STAND_INS
from recipes.shared.command import parser
from recipes.shared.results import load
from recipes.shared.tables import markdown

RESULTS = Path(__file__).parents[1] / "results"
EXPERIMENTS = tuple(dict.fromkeys(row.experiment for row in ROWS))


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


def tables() -> list[Table]:
    """Everything on the page, in the order of the paper."""
    return [*comparisons().values(), figure_4(load(RESULTS / "hessian_time.json")["runs"])]


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the tables as Markdown, or write them."""
    reader = parser("paper", __doc__)
    reader.add_argument("--out", type=Path, metavar="FILE", help="write them there")
    out: Path | None = reader.parse_args(arguments).out
    text = markdown(*tables())
    print(text) if out is None else out.write_text(text)


if __name__ == "__main__":
    main()
