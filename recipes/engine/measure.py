"""The flatness of what a run has trained, over a whole data set."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from fam_optim import dataset_relative_flatness
from recipes.engine.batches import cast, ordered
from recipes.engine.layers import select
from recipes.engine.pictures import title
from recipes.engine.run_folder import RunFolder
from recipes.engine.task import Task, mean
from recipes.engine.training import Conditions, evaluate, kappa_options, moved
from recipes.shared.results import record, save
from recipes.shared.tables import markdown
from recipes.shared.tables import table as make_table


def measure(task: Task, conditions: Conditions, path: Path, *, double: bool = False) -> dict[str, Any]:
    """kappa, layerwise kappa and Tr(H) of all training samples' loss, and the task's metrics.

    Raises:
        FileNotFoundError: if the folder holds no checkpoint.
    """
    state = RunFolder(path).trained(conditions.device)
    data = task.data(conditions.source, conditions.seed)
    model = task.model(conditions.source).to(conditions.device)
    model.load_state_dict(state["model"])
    metrics = {name: mean(value) for name, value in evaluate(task.evaluate, model, data, conditions).items()}
    dtype = torch.float64 if double else torch.float32
    layers = select(model.to(dtype), task.layers)
    batches = [
        cast(batch, dtype)
        for batch in moved(ordered(data.train, conditions.batch_size, conditions.workers), conditions.device)
    ]
    chosen = {name: value for name, value in kappa_options(task).items() if name != "measure"}
    values = {"neuronwise": 0.0, "layerwise": 0.0, "Tr(H)": 0.0}  # each is a sum over the layers
    for layer in layers:
        neuronwise, layerwise = (
            dataset_relative_flatness(model, layer, task.loss, batches, measure=name, **chosen).item()
            for name in ("neuronwise", "layerwise")
        )
        weight = layer.get_parameter("weight")
        values["neuronwise"] += neuronwise
        values["layerwise"] += layerwise
        values["Tr(H)"] += layerwise / weight.square().sum().item()
    return {"epoch": state["epoch"], **values, **metrics}


def table(task: str, measured: Sequence[Mapping[str, Any]]) -> Table:
    """One row per run."""
    names = [name for name in measured[0] if name not in ("label", "seed")]
    rows = [(m["label"], str(m["seed"]), *(f"{m[name]:.6g}" for name in names)) for m in measured]
    caption = f"{task}: kappa (neuronwise, layerwise) and Tr(H) of the training loss, and the metrics"
    return make_table("run", "seed", *map(title, names), title=caption, rows=rows)


def keep(stem: Path, task: str, measured: Sequence[dict[str, Any]], seconds: float, double: bool) -> None:
    """Save what was measured as JSON, and its table as Markdown."""
    save(
        stem.with_suffix(".json"), record("measure", {"task": task, "float64": double}, seconds, [*measured])
    )
    stem.with_suffix(".md").write_text(markdown(table(task, measured)))
