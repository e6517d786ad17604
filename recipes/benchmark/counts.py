"""Counts the multiplications of a training step with FAM and SAM, relative to a step of plain SGD.

It counts those of matrix products and convolutions, forward and backward. If a step does more every tenth
time, the mean counts. Where other operations take the time, the measured ratio is higher.
"""

from collections.abc import Iterator
from typing import Any

import torch

from recipes.benchmark.candidates import CANDIDATES, chosen
from recipes.benchmark.cases import CASES
from recipes.benchmark.measuring import prepared
from recipes.benchmark.tables import tables
from recipes.shared.command import SEVERAL, Options, Recipe
from recipes.shared.results import CPU


def measure(options: Options) -> Iterator[dict[str, Any]]:
    """Yields one row per task."""
    for name in options.tasks:
        torch.manual_seed(options.seed)
        _, found = prepared(CASES[name].build(), chosen(list(CANDIDATES), name), CPU, weighed=False)
        yield {"task": name, "candidates": found}


OPTIONS = {
    "--tasks": {
        **SEVERAL,
        "choices": CASES,
        "default": list(CASES),
        "metavar": "ROW",
        "help": "(default: all)",
    }
}
main = Recipe("benchmark.counts", __doc__, measure, tables, None, OPTIONS, {"tasks": ["tiny 16x16"]}).main

if __name__ == "__main__":
    main()
