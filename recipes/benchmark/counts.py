"""The operations behind the benchmark: multiplications of a step, relative to the plain step's.

    python -m recipes.benchmark.counts
    python -m recipes.benchmark.counts --tasks "resnet18 hidden"
    python -m recipes.benchmark.counts --smoke

Counted by torch.utils.flop_counter are matrix products and convolutions, forward and backward, with every
candidate's share of its dear steps. Entrywise operations are not: where they, or the calls themselves, take
the time, the measured ratio is the higher one.
"""

from functools import partial
from typing import Any

import torch

from recipes.benchmark.candidates import CANDIDATES, chosen
from recipes.benchmark.cases import CASES
from recipes.benchmark.measuring import prepared
from recipes.benchmark.tables import table_of
from recipes.shared.command import Distinct, Options, Recipe
from recipes.shared.results import CPU


def measure(options: Options) -> list[dict[str, Any]]:
    """One row per task."""
    rows = []
    for name in options.tasks:
        torch.manual_seed(options.seed)
        _, found = prepared(CASES[name].build(), chosen(list(CANDIDATES), name), CPU, weighed=False)
        rows.append({"task": name, "candidates": found})
    return rows


TASKS = {"nargs": "+", "action": Distinct, "choices": CASES, "default": list(CASES), "metavar": "TASK"}
SMOKE = {"tasks": ["tiny 16x16"]}
RECIPE = Recipe(
    "benchmark.counts", __doc__, measure, partial(table_of, "count"), None, {"--tasks": TASKS}, SMOKE
)
main = RECIPE.main

if __name__ == "__main__":
    main()
