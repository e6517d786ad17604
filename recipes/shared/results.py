"""Results of the recipes as JSON: what was measured, with which configuration, on which machine."""

import json
import math
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

CPU = torch.device("cpu")


def environment(device: torch.device) -> dict[str, Any]:
    """Versions and hardware behind a measurement."""
    packages = {}
    for name in ("torch", "fam_optim", "pytorch_optimizer"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:  # run from a checkout that is not installed
            packages[name] = "not installed"
    return {
        **packages,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def record(
    recipe: str,
    configuration: dict[str, Any],
    seconds: float,
    runs: list[dict[str, Any]],
    device: torch.device = CPU,
) -> dict[str, Any]:
    """What a recipe saves: what was measured, how, where, and how long that took."""
    return {
        "recipe": recipe,
        "configuration": configuration,
        "environment": environment(device),
        "seconds": seconds,
        "runs": runs,
    }


def cpu_name() -> str:
    """Return the processor's name where the system tells it, otherwise the architecture."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def markdown(*tables: Table) -> str:
    """Tables as Markdown, without their titles."""
    text = StringIO()
    for table in tables:
        table.title = None
        Console(file=text, width=400).print(table)
    lines = [line.rstrip() for line in text.getvalue().splitlines()]
    return "\n".join(line for line in lines if line.startswith("|")) + "\n"


def compact(value: Any, digits: int = 5) -> Any:
    """Round floats to significant digits, and write those that JSON cannot hold (inf, nan) as null."""
    if isinstance(value, float):
        return float(f"{value:.{digits}g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: compact(item, digits) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [compact(item, digits) for item in value]
    return value


def save(path: Path, results: dict[str, Any]) -> None:
    """Write results as JSON, one run per line, small enough to be kept beside the code."""
    path.parent.mkdir(parents=True, exist_ok=True)
    head = {key: value for key, value in results.items() if key != "runs"}
    runs = ",\n".join(json.dumps(compact(run)) for run in results["runs"])
    path.write_text(json.dumps(compact(head), indent=1)[:-2] + f',\n "runs": [\n{runs}\n]}}\n')


def load(path: Path) -> dict[str, Any]:
    """Read what ``save`` wrote."""
    results: dict[str, Any] = json.loads(path.read_text())
    return results
