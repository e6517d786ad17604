"""Trains a small network with SGD, weight decay, SAM and FAM, with clean and with 40 % wrong labels.

    python -m recipes.quickstart                    # tables, JSON and pictures in runs/quickstart
    python -m recipes.quickstart --noise 0.2 --seeds 0 1 2 --epochs 50

It takes minutes on a CPU. recipes/README.md shows what three seeds gave.
"""

from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

from recipes.engine.loop import Conditions
from recipes.engine.optimizers import GAUSS_NEWTON, PROXIMAL, settings
from recipes.engine.task import Source
from recipes.engine.training import train
from recipes.report import collect, report
from recipes.shared import command
from recipes.shared.command import Options
from recipes.shared.results import load, save
from recipes.shared.tables import console as make_console
from recipes.tasks.images import fashion_mnist
from recipes.tasks.small import VALIDATION, quickstart

# The run's label -> its optimizer, and what differs from the task's settings. weight_decay, rho and the
# penalties' lam were chosen from four values each, by validation accuracy at 40 % noise with three other
# seeds (recipes/results/quickstart_tuning.md; the validation labels are as noisy as the training labels).
# Nothing was chosen for the last method: it is FAM.for_model(model, torch.optim.SGD, ...).
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "sgd": ("sgd", {}),
    "sgd-weight_decay": ("sgd", {"weight_decay": 0.03}),
    "sam": ("sam", {"rho": 0.05}),
    "fam-last": ("fam", {"lam": 0.01}),  # the paper's penalty
    "fam-last_but_one": ("fam", {"lam": 0.003, "layers": ["features.9"], **GAUSS_NEWTON}),
    "fam-proximal": ("fam", {"layers": ["hidden"], **PROXIMAL}),
}


def parse_arguments(arguments: Sequence[str] | None = None) -> Options:
    """Reads the command line."""
    common, smoke = ("--seeds", "--device"), "one seed, two epochs, few images"
    parser = command.parser("quickstart", __doc__, *common, out=Path("runs/quickstart"), smoke=smoke)
    parser.add_argument("--epochs", type=command.positive, default=20, help="(default: %(default)s)")
    noise = {**command.SEVERAL, "type": command.fraction, "default": [0.0, 0.4]}
    parser.add_argument("--noise", **noise, help="fractions of wrong labels (default: 0 0.4)")
    size = "training images (default: %(default)s)"
    parser.add_argument("--train-size", type=command.positive, default=2000, help=size)
    options = parser.parse_args(arguments)
    least, most, size = (
        quickstart().batch_size,
        len(fashion_mnist("train")[1]) - VALIDATION,
        options.train_size,
    )
    if not least <= size <= most:
        parser.error(f"argument --train-size: expected from {least} to {most} images, got {size}")
    if options.smoke:
        options.seeds, options.epochs = options.seeds[:1], 2
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains every method at every noise level with every seed, and then writes the report."""
    options = parse_arguments(arguments)
    console, folder = make_console(), command.out(options)
    command.fresh(folder / "runs")  # a demonstration does not continue old runs
    with command.in_a_sentence("quickstart", "stopped; it begins anew"):
        for noise in options.noise:
            task = quickstart(noise, options.train_size)
            console.print(f"[bold]{task.about}")
            asked = options.epochs, task.batch_size, Source(smoke=options.smoke), options.device
            for seed, (label, (optimizer, changes)) in product(options.seeds, METHODS.items()):
                path, chosen = folder / "runs" / task.name / label, settings(task, optimizer, changes)
                title, asked_of = f"{label}, seed {seed}", Conditions(seed, *asked)
                train(task, chosen, asked_of, path / f"seed{seed}", title=title, console=console)
        save(folder / "quickstart.json", collect(folder / "runs"))
        report(load(folder / "quickstart.json"), folder / "quickstart", console)


if __name__ == "__main__":
    main()
