"""Prints the paper's numbers beside ours.

    python -m recipes.paper --out recipes/results/paper.md      # into a file

Our numbers come from the saved results in recipes/results.
"""

from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from recipes.paper.comparison import ROWS, STAND_INS, compare, figure_4
from recipes.shared.command import parser
from recipes.shared.results import grouped, load
from recipes.shared.tables import markdown

RESULTS = Path(__file__).parents[1] / "results"


def tables() -> list[Table]:
    """Makes a table per experiment, in the paper's setting or the small form that was run; then Figure 4."""
    saved = [load(path) for path in sorted(RESULTS.glob("*.json"))]
    ours = (run for results in saved if results.get("recipe") == "train" for run in results["runs"])
    runs, found = grouped(ours, lambda run: run["task"]), []
    for experiment in dict.fromkeys(row.experiment for row in ROWS):
        names = [experiment, *(task for task, (name, _) in STAND_INS.items() if name == experiment)]
        ran = [name for name in names if name in runs]
        found += [compare(name, runs.get(name, [])) for name in ran or [experiment]]
    return [*filter(None, found), figure_4(load(RESULTS / "hessian_time.json")["runs"])]


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the tables as Markdown, or writes them to a file."""
    reader = parser("paper", __doc__)
    reader.add_argument("--out", type=Path, metavar="FILE", help="file to write (default: print)")
    out: Path | None = reader.parse_args(arguments).out
    text = markdown(*tables())
    print(text) if out is None else out.write_text(text)


if __name__ == "__main__":
    main()
