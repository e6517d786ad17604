"""Choose lam and rho for the quick start: four values per method, on validation images, other seeds.

    python -m recipes.tune_quickstart               # 78 trainings, long on two cores: nohup, or fewer --seeds

Prints the validation accuracy of the last epoch, mean over the seeds. Where the training labels are noisy,
so are the validation labels (then 100 % is out of reach). The test split is empty.

The quick start's values are not from here but from a pilot: no run over the whole grid has been finished.
"""

import argparse
import statistics
from collections import defaultdict

import torch
from rich.console import Console

from recipes.datasets import fashion_mnist_splits
from recipes.engine import Method, train_side_by_side
from recipes.models import SmallConvNet
from recipes.progress import progress_bars
from recipes.quickstart import BASE, BATCH_SIZE, LAYER, VALIDATION_SIZE

GRID = (
    Method("SGD", "sgd"),
    *(Method(f"SAM, rho {rho}", "sam", {"rho": rho}) for rho in (0.02, 0.05, 0.07, 0.1)),
    *(Method(f"FAM, lam {lam}", "fam", {"lam": lam}) for lam in (0.001, 0.003, 0.01, 0.03)),
    *(
        Method(f"FAM, detach_hessian, lam {lam}", "fam", {"lam": lam, "detach_hessian": True})
        for lam in (0.003, 0.01, 0.03, 0.1)
    ),
)


def main() -> None:
    """Train the grid and print it."""
    parser = argparse.ArgumentParser(prog="python -m recipes.tune_quickstart")
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[100, 101, 102], help="not those of the quick start"
    )
    parser.add_argument("--noise", type=float, nargs="+", default=[0.0, 0.4])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--train-size", type=int, default=2000)
    options = parser.parse_args()
    console = Console()
    steps = options.epochs * (options.train_size // BATCH_SIZE)
    for noise in options.noise:
        accuracies: dict[str, list[float]] = defaultdict(list)
        for seed in options.seeds:
            splits = fashion_mnist_splits(options.train_size, VALIDATION_SIZE, 0, noise, seed)
            torch.manual_seed(seed)
            model = SmallConvNet()
            with progress_bars(f"{noise:.0%} label noise, seed {seed}", GRID, steps, console) as show:
                runs = train_side_by_side(
                    GRID,
                    model,
                    LAYER,
                    splits,
                    epochs=options.epochs,
                    batch_size=BATCH_SIZE,
                    base=BASE,
                    seed=seed,
                    device=torch.device("cpu"),
                    on_progress=show,
                )
            for run in runs:
                accuracies[run.method.label].append(run.history["val_accuracy"][-1])
        for label, values in accuracies.items():
            every = " ".join(f"{value:.1f}" for value in values)
            console.print(f"{noise:.0%}  {label:32} {statistics.fmean(values):5.1f}   ({every})")


if __name__ == "__main__":
    main()
