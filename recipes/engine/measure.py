"""The flatness of what a run has trained, over a whole data set."""

from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.table import Table

from fam_optim import dataset_relative_flatness
from recipes.engine.batches import cast, ordered
from recipes.engine.run_folder import RunFolder
from recipes.engine.task import Task, mean
from recipes.engine.training import Conditions, evaluate, moved


def measure(task: Task, conditions: Conditions, path: Path, *, double: bool = False) -> dict[str, Any]:
    """kappa, layerwise kappa and Tr(H) of all training samples' loss, and the task's metrics.

    Raises:
        FileNotFoundError: if the folder holds no checkpoint.
    """
    state = RunFolder(path).trained(conditions.device)
    data = task.data(conditions.source, conditions.seed)
    model = task.model(conditions.source).to(conditions.device)
    model.load_state_dict(state["model"])
    metrics = {name: mean(value) for name, value in evaluate(task, model, data, conditions).items()}
    dtype = torch.float64 if double else torch.float32
    layer = model.to(dtype).get_submodule(task.layer)
    batches = [
        cast(batch, dtype)
        for batch in moved(ordered(data.train, conditions.batch_size, conditions.workers), conditions.device)
    ]
    mode = task.methods.get("fam", {}).get("mode", "exact")
    values = {
        name: dataset_relative_flatness(model, layer, task.loss, batches, measure=name, mode=mode).item()
        for name in ("neuronwise", "layerwise")
    }
    weight = layer.get_parameter("weight")
    trace = values["layerwise"] / weight.square().sum().item()
    return {"epoch": state["epoch"], **values, "Tr(H)": trace, **metrics}


def table(measured: dict[str, dict[str, Any]]) -> Table:
    """One row per run."""
    names = list(next(iter(measured.values())))
    result = Table("run", *names, box=box.MARKDOWN)
    for run, values in measured.items():
        result.add_row(run, *(f"{values[name]:.6g}" for name in names))
    return result
