"""Makes tables for a terminal of any width, and as Markdown."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from io import StringIO
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from recipes.shared.results import grouped

WIDE = 1000  # columns of a file or a pipe, where a table may be as wide as it needs


def console() -> Console:
    """Returns a console of the terminal's width; a file or a pipe takes lines of any length."""
    usual = Console()
    return usual if usual.is_terminal else Console(width=WIDE)


def table(*columns: str, title: str = "", rows: Sequence[Sequence[str]] = ()) -> Table:
    """Makes a table whose text is valid Markdown."""
    result = Table(*columns, title=title or None, title_justify="left", box=box.MARKDOWN)
    for row in rows:
        result.add_row(*row)
    return result


def pivot(
    heads: Sequence[str],
    rows: Sequence[Mapping[str, Any]],
    line: Callable[[Mapping[str, Any]], tuple[str, ...]],
    column: Callable[[Mapping[str, Any]], str],
    cell: Callable[[Mapping[str, Any]], str],
    title: str = "",
) -> Table:
    """Makes a table with a cell per row: ``line`` gives its line's first cells, ``column`` its column."""
    columns = list(dict.fromkeys(column(row) for row in rows))
    result = table(*heads, *columns, title=title)
    for first, own in grouped(rows, line).items():
        cells = {column(row): cell(row) for row in own}
        result.add_row(*first, *(cells.get(name, "") for name in columns))
    return result


def summary(name: str, values: Sequence[float]) -> str:
    """Returns mean and standard deviation, such as "0.96 ± 0.02"; for an accuracy, the maximum too."""
    mean = statistics.fmean(values)
    text = f"{mean:.4g}"
    if len(values) > 1 and math.isfinite(mean):  # a run may have diverged, or may not be there yet
        text += f" ± {statistics.stdev(values):.2g}"
        text += f" (max {max(values):.4g})" if name.endswith("accuracy") else ""
    return text


def show(target: Console, *tables: Table) -> None:
    """Prints tables. One that is too wide for the terminal gets a line per cell, so that no number is cut."""
    for wide in tables:
        if target.measure(wide, options=target.options.update(width=WIDE)).maximum <= target.width:
            target.print(wide)
            continue
        names = [str(column.header) for column in wide.columns]
        cells = [[str(cell) for cell in column.cells] for column in wide.columns]
        if wide.title:
            target.print(wide.title, style="italic", soft_wrap=True)
        for row in zip(*cells, strict=True):
            width = max(map(len, names))
            lines = [f"{name.ljust(width)}  {cell}" for name, cell in zip(names, row, strict=True) if cell]
            target.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True, end="\n\n")


def titled(result: Table, heading: str, caption: str) -> Table:
    """Returns the table with a heading, and with a caption that says how to read it."""
    result.title, result.caption = heading, caption
    return result


def markdown(*tables: Table) -> str:
    """Returns tables as Markdown, each under its title, which is a heading if the table has a caption."""
    parts = []
    for each in tables:
        text = StringIO()
        Console(file=text, width=WIDE).print(each)
        lines = [line.rstrip() for line in text.getvalue().splitlines()]
        above = f"## {each.title}\n\n{each.caption}\n\n" if each.caption else f"{each.title}:\n\n"
        body = "\n".join(line for line in lines if line.startswith("|"))
        parts.append(f"{above if each.title else ''}{body}")
    return "\n\n".join(parts) + "\n"
