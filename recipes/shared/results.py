"""Saves and loads results as JSON: what was measured, with which configuration, on which machine."""

import json
import math
import os
import platform
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch

import fam_optim

CPU = torch.device("cpu")
Row = TypeVar("Row")
Key = TypeVar("Key")


def environment(device: torch.device) -> dict[str, Any]:
    """Returns the versions and the hardware behind a measurement."""
    return {
        "torch": version("torch"),
        "fam_optim": fam_optim.__version__,  # the code that runs; another may be installed
        "pytorch_optimizer": version("pytorch_optimizer"),
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def cpu_name() -> str:
    """Returns the processor's name if the system tells it, otherwise the architecture."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def compact(value: Any, digits: int = 5) -> Any:
    """Rounds floats to significant digits, and replaces those that JSON cannot hold (inf, nan) by None."""
    if isinstance(value, float):
        return float(f"{value:.{digits}g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: compact(item, digits) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [compact(item, digits) for item in value]
    return value


def grouped(rows: Iterable[Row], key: Callable[[Row], Key]) -> dict[Key, list[Row]]:
    """Groups the rows by key, in the order in which the keys first appear."""
    groups: dict[Key, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups


def save(path: Path, results: dict[str, Any]) -> None:
    """Writes results as JSON, one run per line, small enough to be kept beside the code.

    All results have the keys "recipe", "environment" and "runs"; most have "configuration" and "seconds" too.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    head = {key: value for key, value in results.items() if key != "runs"}
    runs = ",\n".join(json.dumps(compact(run)) for run in results["runs"])
    path.write_text(json.dumps(compact(head), indent=1)[:-2] + f',\n "runs": [\n{runs}\n]}}\n')


def load(path: Path) -> dict[str, Any]:
    """Reads what ``save`` wrote. Raises ValueError if the file holds something else or is missing."""
    try:
        results = json.loads(path.read_text())
        if not results["runs"]:
            raise ValueError("it has no runs")
    except (OSError, ValueError, TypeError, KeyError) as error:
        absent = isinstance(error, FileNotFoundError)
        reason = "there is no such file" if absent else "it holds something else"
        raise ValueError(f"{path}: expected the JSON of a recipe's results, but {reason}") from error
    return dict(results)
