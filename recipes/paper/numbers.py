"""The paper's own numbers, as it prints them, with table and section: they stand in ``numbers.json``.

What follows a ± in Table 1 (standard deviation or error), its number of seeds, and HD's unit are not stated.
The sizes of Figure 4 stand in the picture only, and so does all of Figure 5: no number of it is in the text.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PRINTED = json.loads((Path(__file__).parent / "numbers.json").read_text())


@dataclass(frozen=True)
class Row:
    """A line of one of the paper's tables."""

    experiment: str  # the task of the recipes that has its settings
    where: str
    scale: float  # from the unit of the records to the paper's
    stated: Mapping[str, Any]  # of a run's configuration and settings, what the paper says of them
    name: str
    optimizers: tuple[str, ...]  # of the recipes that are this line
    numbers: Mapping[str, str]  # by the name of the quantity in a run's records, as printed
    settings: Mapping[str, Any] = field(default_factory=dict)  # of the optimizer, which make it this line
    part: float = 1  # of the training, after which it was measured


ROWS = [
    Row(experiment, own["where"], own["scale"], own["stated"], **line)
    for experiment, own in PRINTED["experiments"].items()
    for line in own["lines"]
]
# tasks that are small forms of the paper's experiments: experiment, what else differs
STAND_INS = {task: tuple(form.values()) for task, form in PRINTED["small_forms"].items()}
# appendix A.1: how many times faster than the one before, on an NVIDIA RTX A6000
FIGURE_4: dict[str, tuple[str, str]] = PRINTED["figure_4"]
