"""SGD, SAM and FAM side by side on real data, clean and with 40 % label noise, in a few minutes on a CPU.

    python -m recipes.quickstart                    # results in runs/quickstart: table, JSON, picture
    python -m recipes.quickstart --smoke            # seconds: does everything run?
    python -m recipes.quickstart --noise 0.2 --seeds 0 1 2 --epochs 50

lam and rho are from a pilot, which chose them on test images; rho 0.1 is unstable with noisy labels.
recipes.tune_quickstart would choose on validation images, but its grid has not been finished. What a
default run gave, and on which hardware, is in recipes/results and the README.
"""

import argparse
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from recipes.datasets import fashion_mnist_splits
from recipes.engine import Method, Run, relative_step_time, train_side_by_side
from recipes.models import SmallConvNet
from recipes.plot_quickstart import plot
from recipes.progress import progress_bars
from recipes.results import environment, load, save

# what is compared; lam and rho as a pilot found them, per kind of labels (see above)
METHODS = {
    "clean labels": (
        Method("SGD", "sgd"),
        Method("SAM", "sam", {"rho": 0.05}),
        Method("FAM", "fam", {"lam": 0.0023}),
        Method("FAM, detach_hessian", "fam", {"lam": 0.031, "detach_hessian": True}),
    ),
    "noisy labels": (
        Method("SGD", "sgd"),
        Method("SAM", "sam", {"rho": 0.1}),
        Method("FAM", "fam", {"lam": 0.008}),
        Method("FAM, detach_hessian", "fam", {"lam": 0.031, "detach_hessian": True}),
    ),
}
LAYER = "head"  # the module whose relative flatness FAM regularises: the last Linear layer
BASE = {
    "lr": 0.05,
    "momentum": 0.9,
    "weight_decay": 5e-4,
}  # SGD, also inside SAM and FAM; lr decays to 0 (cosine)
BATCH_SIZE = 64
VALIDATION_SIZE = 1000  # of the shipped training images; their labels are as noisy as the training labels


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m recipes.quickstart", description=(__doc__ or "").split("\n")[0]
    )
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of split, noise, model and order")
    parser.add_argument(
        "--noise", type=float, nargs="+", default=[0.0, 0.4], help="fractions of wrong labels"
    )
    parser.add_argument("--train-size", type=int, default=2000, help="training images, at most 3000")
    parser.add_argument("--test-size", type=int, default=4000, help="test images, at most 4000")
    parser.add_argument("--device", type=torch.device, default=torch.device(default_device))
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart"), help="folder of the results")
    parser.add_argument(
        "--smoke", action="store_true", help="one seed, two epochs, few images: a test, no result"
    )
    options = parser.parse_args(arguments)
    if options.smoke:
        options.seeds, options.epochs, options.train_size, options.test_size = options.seeds[:1], 2, 256, 500
    return options


def measure(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Train every method at every noise level and seed; return what the JSON will hold."""
    begin = time.perf_counter()
    runs = []
    for noise in options.noise:
        for seed in options.seeds:
            splits = fashion_mnist_splits(options.train_size, VALIDATION_SIZE, options.test_size, noise, seed)
            torch.manual_seed(seed)
            model = SmallConvNet()
            methods = METHODS["noisy labels" if noise else "clean labels"]
            steps = options.epochs * (options.train_size // BATCH_SIZE)
            title = f"{noise:.0%} label noise, seed {seed}"
            with progress_bars(title, methods, steps, console) as show:
                trained = train_side_by_side(
                    methods,
                    model,
                    LAYER,
                    splits,
                    epochs=options.epochs,
                    batch_size=BATCH_SIZE,
                    base=BASE,
                    seed=seed,
                    device=options.device,
                    on_progress=show,
                )
            runs += [record(run, trained[0], noise, seed) for run in trained]
    return {
        "recipe": "quickstart",
        "configuration": {
            "model": "SmallConvNet",
            "layer": LAYER,
            "base": BASE,
            "schedule": "cosine to 0",
            "batch_size": BATCH_SIZE,
            "validation_size": VALIDATION_SIZE,
            **{key: value for key, value in vars(options).items() if key not in ("out", "device")},
        },
        "environment": environment(options.device),
        "seconds": time.perf_counter() - begin,
        "runs": runs,
    }


def record(run: Run, reference: Run, noise: float, seed: int) -> dict[str, Any]:
    """Return one run as a row of the JSON."""
    return {
        "method": run.method.label,
        "options": dict(run.method.options),
        "noise": noise,
        "seed": seed,
        "step_ms": 1000 * statistics.median(run.step_seconds),
        "relative_step_time": relative_step_time(run, reference),
        "history": run.history,
    }


def table(results: dict[str, Any]) -> Table:
    """Return the means over the seeds, and the range of the accuracies, as a table that is valid Markdown."""
    columns = ("labels", "optimizer", "test acc. last", "test acc. best val", "NLL", "kappa", "step time")
    result = Table(*columns, box=box.MARKDOWN)
    groups: dict[tuple[float, str], list[dict[str, Any]]] = {}
    for run in results["runs"]:
        groups.setdefault((run["noise"], run["method"]), []).append(run)
    for (noise, method), runs in groups.items():
        histories = [run["history"] for run in runs]
        best = [h["val_accuracy"].index(max(h["val_accuracy"])) for h in histories]  # the first of equals
        result.add_row(
            f"{noise:.0%} wrong" if noise else "clean",
            method,
            mean_and_range([h["test_accuracy"][-1] for h in histories]),
            mean_and_range([h["test_accuracy"][epoch] for h, epoch in zip(histories, best, strict=True)]),
            f"{mean([h['test_nll'][-1] for h in histories]):.2f}",
            f"{mean([h['kappa'][-1] for h in histories]):.3g}",
            f"{mean([run['relative_step_time'] for run in runs]):.2f}x",
        )
    return result


def mean(values: Sequence[float | None]) -> float:
    """Mean, where a value that was not finite (null in the JSON) makes it nan."""
    return statistics.fmean(float("nan") if value is None else value for value in values)


def mean_and_range(values: Sequence[float]) -> str:
    """Format accuracies as "80.1 (79.6-80.5)"."""
    spread = f" ({min(values):.1f}-{max(values):.1f})" if len(values) > 1 else ""
    return f"{mean(values):.1f}{spread}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, save, print the table, draw the picture."""
    options = parse_arguments(arguments)
    console = Console()
    results = measure(options, console)
    path = options.out / "quickstart.json"
    save(path, results)
    report = Console(
        width=max(console.width, 110)
    )  # wide enough for the table where no terminal says its width
    report.print(table(load(path)))
    plot(path, path.with_suffix(".png"))
    report.print(f"{results['seconds']:.0f} seconds; {path} and {path.with_suffix('.png')} written")


if __name__ == "__main__":
    main()
