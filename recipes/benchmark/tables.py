"""Makes the benchmark's tables: time, peak memory and operations, relative to the plain step."""

from collections.abc import Sequence
from typing import Any

from rich.table import Table

from recipes.shared.tables import table as make_table
from recipes.shared.timing import with_quartiles

# a ratio in the results -> the table's title; the quantity itself, its unit, the factor to that unit
QUANTITIES = {
    "ratio": ("time", "seconds", "ms", 1e3),
    "memory": ("peak memory", "peak_bytes", "MB", 1e-6),
    "count": ("multiplications", "operations", "million", 0.5e-6),  # a multiplication is two operations
}


def tables(rows: Sequence[dict[str, Any]]) -> list[Table]:
    """Makes the tables of time, peak memory and multiplications, as far as they were measured."""
    found = [table_of(quantity, rows) for quantity in QUANTITIES]
    return [table for table in found if len(table.columns) > 2]


def table_of(quantity: str, rows: Sequence[dict[str, Any]]) -> Table:
    """Makes a table with a row per case, and a column per candidate that has the quantity."""
    title, name, unit, factor = QUANTITIES[quantity]
    measured = [row for row in rows if quantity in row["candidates"].get("plain", {})]
    found = [label for row in measured for label, own in row["candidates"].items() if quantity in own]
    labels = [label for label in dict.fromkeys(found) if label != "plain"]
    table = make_table("task", "plain", *labels, title=f"{title} of a step, relative to the plain step")
    for row in measured:
        number = factor * row["candidates"]["plain"][name]
        plain = f"{number:,.0f} {unit}" if number >= 1000 else f"{number:.3g} {unit}"
        cells = [cell(row["candidates"].get(label, {}), quantity) for label in labels]
        table.add_row(row["task"], plain, *cells)
    return table


def cell(result: dict[str, Any], quantity: str) -> str:
    """Returns one candidate's cell: the ratio, "refused", or nothing."""
    if "refused" in result or quantity not in result:
        return "refused" if "refused" in result else ""
    if quantity == "ratio":
        return with_quartiles(result["ratio"], result["quartiles"])
    return f"{result[quantity]:.2f}"
