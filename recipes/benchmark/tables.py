"""The benchmark's tables: time, peak memory and operations of every candidate, relative to the plain step."""

from collections.abc import Callable, Sequence
from typing import Any

from rich.table import Table

from recipes.shared.tables import table as make_table
from recipes.shared.timing import with_quartiles

Result = dict[str, Any]
Rows = Sequence[dict[str, Any]]


def tables(rows: Rows) -> list[Table]:
    """Time with quartiles, peak memory, operations, where they were measured."""
    found = [time_table(rows), memory_table(rows), count_table(rows)]
    return [table for table in found if len(table.columns) > 2]


def time_table(rows: Rows) -> Table:
    """Median and quartiles of the ratios."""
    return _table(
        *("time", "ratio", rows),
        lambda result: f"{readable(1000 * result['seconds'])} ms",
        lambda result: with_quartiles(result["ratio"], result["quartiles"]),
    )


def memory_table(rows: Rows) -> Table:
    """Peaks."""
    return _table(
        *("peak memory", "memory", rows), lambda result: f"{readable(result['peak_bytes'] / 1e6)} MB"
    )


def count_table(rows: Rows) -> Table:
    """Multiplications."""
    return _table(
        *("multiplications", "count", rows), lambda result: f"{readable(result['operations'] / 2e6)} million"
    )


def readable(number: float) -> str:
    """Three digits, or all that stand before the point."""
    return f"{number:,.0f}" if number >= 1000 else f"{number:.3g}"


def _table(
    title: str,
    quantity: str,
    rows: Rows,
    absolute: Callable[[Result], str],
    relative: Callable[[Result], str] | None = None,
) -> Table:
    """A row per case, a column per candidate of which there is something to say."""
    measured = [row for row in rows if quantity in row["candidates"].get("plain", {})]
    found = [label for row in measured for label, own in row["candidates"].items() if quantity in own]
    labels = [label for label in dict.fromkeys(found) if label != "plain"]
    table = make_table("task", "plain", *labels, title=f"{title} of a step, relative to the plain step")
    for row in measured:
        own = {label: row["candidates"].get(label, {}) for label in labels}
        cells = [
            "refused" if "refused" in result
            else "" if quantity not in result
            else relative(result) if relative
            else f"{result[quantity]:.2f}"
            for result in own.values()
        ]  # fmt: skip
        table.add_row(row["task"], absolute(row["candidates"]["plain"]), *cells)
    return table
