"""SGD, SAM and FAM side by side on real data, clean and with 40 % label noise, in a few minutes on a CPU.

    python -m recipes.quickstart                    # results in runs/quickstart: table, JSON, pictures
    python -m recipes.quickstart --smoke            # seconds: does everything run?
    python -m recipes.quickstart --noise 0.2 --seeds 0 1 2 --epochs 50

What a run with three seeds gave, and on which hardware, is in the README.
"""

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from recipes.engine.optimizers import settings
from recipes.engine.progress import progress_bar
from recipes.engine.task import Source
from recipes.engine.training import Conditions, train
from recipes.report import collect, report
from recipes.shared.results import save
from recipes.tasks.small import quickstart

# What is compared: the run's label, the optimizer and what differs from the task's settings. rho and lam
# have the best validation accuracy of four values each, at 40 % noise with three other seeds
# (recipes/results/quickstart_tuning.md; the validation labels are as noisy as the training labels).
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "sgd": ("sgd", {}),
    "sam": ("sam", {"rho": 0.05}),
    "fam": ("fam", {"lam": 0.01}),
    "fam-detach_hessian": ("fam", {"lam": 0.03, "detach_hessian": True}),
}


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
    parser.add_argument("--device", type=torch.device, default=torch.device(default_device))
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart"), help="folder of the results")
    parser.add_argument(
        "--smoke", action="store_true", help="one seed, two epochs, few images: a test, no result"
    )
    options = parser.parse_args(arguments)
    if options.smoke:
        options.seeds, options.epochs = options.seeds[:1], 2
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Train every method at every noise level with every seed; then the report."""
    options = parse_arguments(arguments)
    console = Console(width=180)
    source = Source(smoke=options.smoke)
    shutil.rmtree(options.out / "runs", ignore_errors=True)  # a demonstration starts afresh
    for noise in options.noise:
        task = quickstart(noise, options.train_size)
        console.print(f"[bold]{task.about}")
        for seed in options.seeds:
            conditions = Conditions(seed, options.epochs, task.batch_size, source, options.device)
            for label, (optimizer, changes) in METHODS.items():
                path = options.out / "runs" / task.name / label / f"seed{seed}"
                with progress_bar(f"{label}, seed {seed}".ljust(28), task, console) as show:
                    train(task, settings(task, optimizer, changes), conditions, path, on_progress=show)
    results = collect(options.out / "runs")
    save(options.out / "quickstart.json", results)
    report(results, options.out / "quickstart", console)


if __name__ == "__main__":
    main()
