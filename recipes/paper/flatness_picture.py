"""What kappa means, as a picture: the extra loss when the layer's input is perturbed, and kappa's parabola.

    python -m recipes.paper.flatness_picture runs/quickstart/*/seed0      # runs of recipes.train, on the CPU
    python -m recipes.paper.flatness_picture --smoke
    python -m recipes.paper.flatness_picture --plot runs/flatness_picture/flatness_picture.json

Every sample's input phi of the regularised Linear layer gets Gaussian noise of standard deviation
``strength * ||phi||`` in each coordinate. Then the expected extra loss is ``strength^2 / 2 * kappa`` plus
terms of fourth order (kappa = sum_i ||phi_i||^2 Laplacian_{phi_i} L). So a small kappa is a flat curve here,
and where curve and parabola part, the quadratic approximation ends. Only relative flatness draws this:
a trace of the Hessian does not know how large the features are.
"""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from rich.table import Table
from torch import Tensor, nn

from fam_optim import dataset_relative_flatness
from recipes.engine.batches import cast, first, ordered
from recipes.engine.layers import select
from recipes.engine.optimizers import settings
from recipes.engine.run_folder import RunFolder
from recipes.engine.task import Batch, Source, Task
from recipes.engine.training import Conditions, train
from recipes.shared.command import Options, Recipe, fresh, out, positive
from recipes.shared.pictures import legend_above, looks, panels, tidy
from recipes.shared.results import CPU
from recipes.shared.tables import table as make_table
from recipes.tasks import load_task
from recipes.tasks.small import quickstart

STRENGTHS = np.geomspace(1e-3, 1, 13).tolist()  # standard deviation of a coordinate, relative to ||phi||
SAMPLES = 250  # of the training set, on which loss and kappa are taken


@contextmanager
def noisy_input(layer: nn.Module, strength: float, seed: int) -> Iterator[None]:
    """Within the context the layer sees its input phi (..., m) with noise in proportion to its norm."""
    generator = torch.Generator().manual_seed(seed)

    def perturb(module: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
        phi = inputs[0]
        noise = torch.randn(phi.shape, generator=generator, dtype=phi.dtype).to(phi.device)
        noisy: Tensor = phi + strength * phi.norm(dim=-1, keepdim=True) * noise
        return noisy

    handle = layer.register_forward_pre_hook(perturb)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def mean_loss(task: Task, model: nn.Module, batches: Sequence[Batch]) -> float:
    """The loss over all samples, of a model in eval mode."""
    losses = [(task.loss(model(inputs), targets).item(), len(targets)) for inputs, targets in batches]
    return sum(loss * count for loss, count in losses) / sum(count for _, count in losses)


def extra_loss(folder: RunFolder, source: Source, draws: int) -> dict[str, Any]:
    """The curve of one run: mean and standard error of the extra loss over the draws, in double precision."""
    config, state = folder.read("config.json"), folder.trained(torch.device("cpu"))
    task = load_task(config["task"])
    data = task.data(source, config["seed"])
    model = task.model(source)
    model.load_state_dict(state["model"])
    layer, *others = select(model.double().eval(), config["layers"])
    if others or not isinstance(layer, nn.Linear):
        raise ValueError(f"expected {folder.path} to have one nn.Linear as its layer, got {config['layers']}")
    batches = [cast(batch, torch.float64) for batch in ordered(first(data.train, SAMPLES), SAMPLES)]
    kappa = dataset_relative_flatness(model, layer, task.loss, batches).item()
    plain = mean_loss(task, model, batches)
    means, errors = [], []
    for strength in STRENGTHS:
        extra = []
        for seed in range(draws):  # each noise with both signs: what is linear in it cancels
            both = []
            for sign in (1, -1):
                with noisy_input(layer, sign * strength, seed):
                    both.append(mean_loss(task, model, batches))
            extra.append(statistics.fmean(both) - plain)
        means.append(statistics.fmean(extra))
        errors.append(statistics.stdev(extra) / draws**0.5)
    return {
        "task": task.name,
        "label": folder.path.parent.name,
        "seed": config["seed"],
        "kappa": kappa,
        "loss": plain,
        "extra_loss": means,
        "standard_error": errors,
    }


def measure(options: Options) -> list[dict[str, Any]]:
    """One curve per run."""
    options.strengths = STRENGTHS  # saved with the results
    folders = options.runs or (smoke_runs(out(options) / "runs") if options.smoke else [])
    if not folders:
        raise ValueError(
            "expected the folders of one run or more, such as runs/quickstart/fam/seed0, or --plot"
        )
    curves = []
    for folder in map(RunFolder, folders):
        source = Source(options.data, smoke=folder.read("config.json")["smoke"])
        curves.append(extra_loss(folder, source, options.draws))
    return curves


def smoke_runs(folder: Path) -> list[Path]:
    """Folders of two runs that were trained for an epoch, for a smoke test without any."""
    task, paths = quickstart(0), []
    for optimizer in ("sgd", "fam"):
        conditions = Conditions(0, 1, task.batch_size, Source(smoke=True), CPU)
        paths.append(fresh(folder / optimizer / "seed0"))
        train(task, settings(task, optimizer, {}), conditions, paths[-1])
    return paths


def table(runs: Sequence[dict[str, Any]]) -> Table:
    """One line per run."""
    rows = [(run["label"], str(run["seed"]), f"{run['kappa']:.4g}", f"{run['loss']:.4g}") for run in runs]
    return make_table("run", "seed", "kappa", "loss", rows=rows)


def plot(results: Mapping[str, Any]) -> Figure:
    """The measured curves, and kappa's parabolas dashed."""
    runs, strengths = results["runs"], np.array(results["configuration"]["strengths"])
    figure, axes = panels(1, 1, 6.4, 4.4)
    axis = axes[0, 0]
    chosen = looks(run["label"] for run in runs)
    for run in runs:
        look, label = chosen[run["label"]], f"{run['label']}: kappa {run['kappa']:.3g}"
        extra, error = (np.array(run[name]) for name in ("extra_loss", "standard_error"))
        axis.errorbar(strengths, extra, error, **look, markersize=4, label=label)
        axis.plot(
            strengths, strengths**2 / 2 * run["kappa"], color=look["color"], linestyle="--", linewidth=0.9
        )
    axis.set_xlabel("strength of the noise per coordinate (a fraction of the features' norm)")
    axis.set_ylabel("extra loss (nats)")
    tidy(axis, "extra loss under relative feature noise; dashed: ½ strength² kappa", log="xy")
    lowest = min(min(value for value in run["extra_loss"] if value > 0) for run in runs)
    axis.set_ylim(bottom=lowest / 2, top=4 * max(max(run["extra_loss"]) for run in runs))
    legend_above(figure, axis, 2)
    return figure


OPTIONS: dict[str, dict[str, Any]] = {
    "runs": {"nargs": "*", "type": Path, "help": "folders such as runs/quickstart/fam/seed0"},
    "--draws": {"type": positive, "default": 10, "help": "of the noise, per strength; from 2 on"},
    "--data": {"type": Path, "default": Path("data"), "help": "folder of the data sets"},
}
RECIPE = Recipe("paper.flatness_picture", __doc__, measure, table, plot, OPTIONS, {"draws": 2})
main = RECIPE.main

if __name__ == "__main__":
    main()
