"""What kappa means, as a picture: the extra loss when the layer's input is perturbed, and kappa's parabola.

    python -m recipes.paper.flatness_picture runs/quickstart/*/seed0      # runs of recipes.train, on the CPU
    python -m recipes.paper.flatness_picture --plot runs/flatness_picture/flatness_picture.json

Every sample's input phi of the regularised Linear layer gets Gaussian noise of standard deviation
``strength * ||phi||`` in each coordinate. Then the expected extra loss is ``strength^2 / 2 * kappa`` plus
terms of fourth order (kappa = sum_i ||phi_i||^2 Laplacian_{phi_i} L). So a small kappa is a flat curve here,
and where curve and parabola part, the quadratic approximation ends. Only relative flatness draws this:
a trace of the Hessian does not know how large the features are.
"""

import argparse
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # draws to files, needs no display

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor, nn

from fam_optim import dataset_relative_flatness
from recipes.engine.batches import cast, first, ordered
from recipes.engine.pictures import colours
from recipes.engine.run_folder import RunFolder
from recipes.engine.task import Batch, Source, Task
from recipes.shared.results import load, record, save
from recipes.tasks import load_task

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
    layer = model.double().eval().get_submodule(task.layer)
    if not isinstance(layer, nn.Linear):
        raise ValueError(f"expected the layer of {task.name} to be an nn.Linear, got {type(layer).__name__}")
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


def plot(source: Path, target: Path) -> None:
    """Draw the measured curves, and kappa's parabolas dashed."""
    results = load(source)
    strengths = np.array(results["configuration"]["strengths"])
    figure, axis = plt.subplots(figsize=(6, 4.2))
    chosen = colours(results["runs"])
    for run in results["runs"]:
        colour = chosen[run["label"]]
        label = f"{run['label']}: kappa {run['kappa']:.3g}"
        extra, error = (np.array(run[name]) for name in ("extra_loss", "standard_error"))
        axis.errorbar(strengths, extra, error, color=colour, marker="o", markersize=3, label=label)
        axis.plot(strengths, strengths**2 / 2 * run["kappa"], color=colour, linestyle="--", linewidth=0.9)
    axis.set(xscale="log", yscale="log", xlabel="noise per coordinate, relative to the features' norm")
    lowest = min(min(value for value in run["extra_loss"] if value > 0) for run in results["runs"])
    axis.set_ylim(bottom=lowest / 2, top=4 * max(max(run["extra_loss"]) for run in results["runs"]))
    axis.set_title(
        "extra loss under relative feature noise; dashed: ½ strength² kappa", loc="left", fontsize=9
    )
    axis.legend(frameon=False, fontsize=9)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(target, dpi=120)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, save, draw."""
    parser = argparse.ArgumentParser(
        prog="python -m recipes.paper.flatness_picture", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("runs", nargs="*", type=Path, help="folders such as runs/quickstart/fam/seed0")
    parser.add_argument("--draws", type=int, default=10, help="of the noise, per strength")
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder of the data sets")
    parser.add_argument("--out", type=Path, default=Path("runs/flatness_picture"))
    parser.add_argument("--plot", type=Path, metavar="JSON", help="only draw what was measured before")
    options = parser.parse_args(arguments)
    if options.plot:
        plot(options.plot, options.plot.with_suffix(".png"))
        return
    if not options.runs:
        parser.error("expected the folders of one run or more, or --plot")
    begin = time.perf_counter()
    runs = []
    for path in options.runs:
        folder = RunFolder(path)
        source = Source(options.data, smoke=folder.read("config.json")["smoke"])
        runs.append(extra_loss(folder, source, options.draws))
    path = options.out / "flatness_picture.json"
    configuration = {"strengths": STRENGTHS, "draws": options.draws}
    save(path, record("flatness_picture", configuration, time.perf_counter() - begin, runs))
    plot(path, path.with_suffix(".png"))
    print(f"{path} and {path.with_suffix('.png')} written")


if __name__ == "__main__":
    main()
