"""Tables of the study, as Markdown, from its saved results."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from recipes.study.analysis import Results


def write(stages: Mapping[str, Results], costs: Mapping[str, Any], target: Path) -> None:
    """Write every table whose stage was run."""
