"""The operations behind the benchmark: multiplications of a step, relative to the plain step's.

    python -m recipes.benchmark.counts
    python -m recipes.benchmark.counts --tasks "resnet18 hidden"
    python -m recipes.benchmark.counts --smoke

Counted by torch.utils.flop_counter are matrix products and convolutions, forward and backward, with every
candidate's share of its dear steps. Entrywise operations are not: where they, or the calls themselves, take
the time, the measured ratio is the higher one.
"""

from typing import Any

import torch

from recipes.benchmark.candidates import CANDIDATES, chosen
from recipes.benchmark.cases import CASES
from recipes.benchmark.measuring import flops, relative, repeated
from recipes.benchmark.tables import count_table
from recipes.shared.command import Options, Recipe
from recipes.shared.problem import Problem


def counted(problem: Problem, labels: list[str], name: str) -> dict[str, dict[str, Any]]:
    """The candidates' operations a step, after a first period, which finds out what is remembered."""
    results: dict[str, dict[str, Any]] = {}
    for label, candidate in chosen(labels, name).items():
        try:
            period = repeated(candidate.build(problem.copy()), candidate.period)
            period()
            results[label] = {"operations": flops(period) / candidate.period}
        except RuntimeError as error:
            results[label] = {"refused": str(error)}
    return relative(results, {"count": "operations"})


def measure(options: Options) -> list[dict[str, Any]]:
    """One row per task."""
    rows = []
    for name in options.tasks:
        torch.manual_seed(options.seed)
        found = counted(CASES[name].build(), list(CANDIDATES), name)
        rows.append({"task": name, "candidates": found})
    return rows


OPTIONS: dict[str, dict[str, Any]] = {
    "--tasks": {"nargs": "+", "choices": CASES, "default": list(CASES), "metavar": "TASK"},
}
SMOKE = {"tasks": ["tiny 16x16", "151 layers of 16 hidden"]}
RECIPE = Recipe("benchmark.counts", __doc__, measure, count_table, None, OPTIONS, SMOKE)
main = RECIPE.main

if __name__ == "__main__":
    main()
