"""The benchmark's tables: time, peak memory and operations of every candidate, relative to the plain step."""

from collections.abc import Sequence
from typing import Any

from rich.table import Table

from recipes.shared.tables import table as make_table
from recipes.shared.timing import with_quartiles

# of a result -> the table's title; the quantity itself, in which unit, and that number's share of it
QUANTITIES = {
    "ratio": ("time", "seconds", "ms", 1e3),
    "memory": ("peak memory", "peak_bytes", "MB", 1e-6),
    "count": ("multiplications", "operations", "million", 0.5e-6),  # an operation is half of a multiplication
}


def tables(rows: Sequence[dict[str, Any]]) -> list[Table]:
    """Time with quartiles, peak memory, multiplications, where they were measured."""
    found = [table_of(quantity, rows) for quantity in QUANTITIES]
    return [table for table in found if len(table.columns) > 2]


def table_of(quantity: str, rows: Sequence[dict[str, Any]]) -> Table:
    """A row per case, a column per candidate of which there is something to say."""
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
    """What there is to say of one candidate."""
    if "refused" in result or quantity not in result:
        return "refused" if "refused" in result else ""
    if quantity == "ratio":
        return with_quartiles(result["ratio"], result["quartiles"])
    return f"{result[quantity]:.2f}"
