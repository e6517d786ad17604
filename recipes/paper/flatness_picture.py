"""Draws what kappa means: the extra loss when noise is added to a layer's input, and kappa's parabola.

    python -m recipes.paper.flatness_picture runs/quickstart/*/seed0      # runs of recipes.train, on the CPU

Every sample's input phi of the regularised Linear layer gets Gaussian noise of standard deviation
``strength * ||phi||`` in each coordinate. Then the expected extra loss is ``strength^2 / 2 * kappa`` plus
terms of fourth order (kappa = sum_i ||phi_i||^2 Laplacian_{phi_i} L): a small kappa is a flat curve here.
"""

import statistics
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from rich.table import Table
from torch import Tensor, nn

from fam_optim import dataset_relative_flatness
from recipes.engine.batches import each_tensor, first, ordered
from recipes.engine.layers import select
from recipes.engine.task import Batch, Task
from recipes.flatness import OF_RUNS, runs_asked
from recipes.shared.command import Options, Recipe, positive
from recipes.shared.pictures import legend_above, looks, panels, tidy
from recipes.shared.tables import table as make_table
from recipes.tasks import Trained

STRENGTHS = np.geomspace(1e-3, 1, 13).tolist()  # standard deviation of a coordinate, relative to ||phi||
SAMPLES = 250  # training samples on which loss and kappa are measured


@torch.no_grad()
def mean_loss(
    task: Task, model: nn.Module, layer: nn.Linear, batches: Sequence[Batch], strength: float, seed: int
) -> float:
    """Returns the loss over all samples, with noise on the layer's input phi (..., m) scaled by its norm."""
    generator = torch.Generator().manual_seed(seed)

    def perturb(module: nn.Module, inputs: tuple[Tensor, ...]) -> Any:
        (phi,) = inputs
        noise = torch.randn(phi.shape, generator=generator, dtype=phi.dtype)
        return phi + strength * phi.norm(dim=-1, keepdim=True) * noise

    with layer.register_forward_pre_hook(perturb):
        losses = [task.loss(model(inputs), targets).item() * len(targets) for inputs, targets in batches]
    return sum(losses) / sum(len(targets) for _, targets in batches)


def extra_loss(run: Trained, draws: int, strengths: Sequence[float]) -> dict[str, Any]:
    """Returns a run's curve: mean and standard error of the extra loss over the draws, in float64."""
    task, (*_, model) = run.task, run.networks.values()
    layer, *others = select(model.double().eval(), run.config["layers"])
    if others or not isinstance(layer, nn.Linear):
        named = run.config["layers"]
        raise ValueError(f"expected {run.label} to have one nn.Linear as its layer, got {named}")
    samples = ordered(first(run.data.train, SAMPLES), SAMPLES)
    batches = [each_tensor(lambda t: t.double() if t.is_floating_point() else t, batch) for batch in samples]
    loss = partial(mean_loss, task, model, layer, batches)
    plain, means, errors = loss(0, 0), [], []
    for strength in strengths:  # each noise is used with both signs, so that terms linear in it cancel
        both = [(loss(strength, seed) + loss(-strength, seed)) / 2 - plain for seed in range(draws)]
        means.append(statistics.fmean(both))
        errors.append(statistics.stdev(both) / draws**0.5)
    return {
        "task": run.config["task"],
        "label": run.label,
        "seed": run.config["seed"],
        "kappa": dataset_relative_flatness(model, layer, task.loss, batches).item(),
        "loss": plain,
        "extra_loss": means,
        "standard_error": errors,
    }


def measure(options: Options) -> list[dict[str, Any]]:
    """Measures one curve per run."""
    options.strengths = STRENGTHS[::4] if options.smoke else STRENGTHS  # saved with the results
    return [extra_loss(run, options.draws, options.strengths) for run in runs_asked(options)]


def table(runs: Sequence[dict[str, Any]]) -> Table:
    """Makes a table with one line per run."""
    rows = [(run["label"], str(run["seed"]), f"{run['kappa']:.4g}", f"{run['loss']:.4g}") for run in runs]
    return make_table("run", "seed", "kappa", "loss", rows=rows)


def plot(results: Mapping[str, Any]) -> Figure:
    """Draws the measured curves, and kappa's parabolas as dashed lines."""
    runs, strengths = results["runs"], np.array(results["configuration"]["strengths"])
    figure, axes = panels(1, 1, 6.4, 4.4)
    axis = axes[0, 0]
    chosen = looks(run["label"] for run in runs)
    for run in runs:
        look, label = chosen[run["label"]], f"{run['label']}: kappa {run['kappa']:.3g}"
        extra, error = (np.array(run[name]) for name in ("extra_loss", "standard_error"))
        axis.errorbar(strengths, extra, error, **look, markersize=4, label=label)
        axis.plot(strengths, strengths**2 / 2 * run["kappa"], "--", color=look["color"], linewidth=0.9)
    axis.set_xlabel("strength of the noise per coordinate (a fraction of the features' norm)")
    axis.set_ylabel("extra loss (nats)")
    tidy(axis, "extra loss under relative feature noise; dashed: ½ strength² kappa", log="xy")
    lowest = min(min(value for value in run["extra_loss"] if value > 0) for run in runs)
    axis.set_ylim(bottom=lowest / 2, top=4 * max(max(run["extra_loss"]) for run in runs))
    legend_above(figure, axis, 2)
    return figure


OPTIONS: dict[str, dict[str, Any]] = {
    **OF_RUNS,
    "--draws": {
        "type": positive,
        "default": 10,
        "help": "of the noise, for each strength; at least 2 (default: 10)",
    },
}
main = Recipe("paper.flatness_picture", __doc__, measure, table, plot, OPTIONS, {"draws": 2}).main

if __name__ == "__main__":
    main()
