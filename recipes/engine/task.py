"""A task: the data, network, loss and settings of an experiment, which ``recipes.engine.loop`` trains.

A task is data: where its samples come from, the network and the layer whose flatness counts, the loss, what
is evaluated, and the settings of its optimizers. A new experiment is a new ``Task``, not a new script.
"""

import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from recipes.engine.schedules import cosine

Batch = tuple[Any, Any]  # inputs, targets: whatever the network and the loss take
Metrics = dict[str, float | list[float]]  # a number, or one per sample (drawn as box plots)
Evaluation = Callable[[nn.Module, Iterable[Batch]], Metrics]
Samples = Dataset[Any]  # of (inputs, targets); torch's default collation makes the batches


class Missing(FileNotFoundError):
    """Data or a package that a task needs is not there; the message is one sentence with the remedy."""


@dataclass(frozen=True)
class Source:
    """Where a task takes its data from, as asked on the command line."""

    folder: Path = Path("data")  # real data sets, one folder each
    download: bool = False  # fetch what is missing
    smoke: bool = False  # a few samples, generated or shipped, through the same code; small networks


def package(name: str, extra: str = "paper") -> Any:
    """An optional package."""
    try:
        return import_module(name)
    except ImportError as error:
        raise Missing(f'{error.name or name} is not installed: pip install -e ".[{extra}]"') from error


def missing(name: str, folder: Path, source: Source, otherwise: str = "") -> Missing:
    """What to say where reading a data set failed."""
    if source.download:
        return Missing(f"{name} could not be downloaded into {folder}: check the connection{otherwise}")
    return Missing(f"{name} is not in {folder}: let --download fetch it{otherwise}")


@dataclass(frozen=True)
class Data:
    """The samples of a task, ready for a loader."""

    train: Samples
    evaluation: Mapping[str, Samples]  # by name, such as "validation" and "test"


def mean(value: float | list[float]) -> float:
    """A metric as one number."""
    return statistics.fmean(value) if isinstance(value, list) else value


@torch.no_grad()
def predictions(model: nn.Module, batches: Iterable[Batch]) -> tuple[Tensor, Tensor]:
    """Outputs and targets, of a model in eval mode."""
    pairs = [(model(inputs).float(), targets) for inputs, targets in batches]
    return torch.cat([pair[0] for pair in pairs]), torch.cat([pair[1] for pair in pairs])


def classification(model: nn.Module, batches: Iterable[Batch]) -> Metrics:
    """Accuracy in percent and mean negative log-likelihood."""
    logits, targets = predictions(model, batches)
    accuracy = 100 * (logits.argmax(1) == targets).float().mean().item()
    return {"accuracy": accuracy, "nll": nn.functional.cross_entropy(logits, targets).item()}


def regression(model: nn.Module, batches: Iterable[Batch]) -> Metrics:
    """Part of the targets' variance that is explained (R^2), in percent, and mean squared error."""
    outputs, targets = predictions(model, batches)
    residual = (outputs - targets).square().mean() / targets.var(correction=0)
    return {"explained": 100 * (1 - residual.item()), "mse": nn.functional.mse_loss(outputs, targets).item()}


@dataclass(frozen=True)
class Task:
    """An experiment, with the paper's settings as its defaults where it is one of the paper's."""

    data: Callable[[Source, int], Data]  # (source, seed); raises Missing
    model: Callable[[Source], nn.Module]  # maps a batch's inputs to the loss's outputs
    layers: tuple[str, ...]  # names of the modules whose relative flatness FAM regularises, or "all", ...
    epochs: int
    batch_size: int
    name: str = ""  # the key in recipes.tasks.TASKS, which knows the sentence too
    about: str = ""  # what is trained on what, and where the paper has it
    base: str = "sgd"  # the optimizer inside SAM, ASAM and FAM: a name in recipes.engine.optimizers.BASES
    options: Mapping[str, Any] = field(default_factory=dict)  # of the base optimizer
    methods: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # what an --optimizer changes
    schedule: Callable[[float], float] = cosine  # factor of the learning rate by progress in [0, 1)
    loss: Callable[[Any, Any], Tensor] = nn.functional.cross_entropy  # (outputs, targets) -> () mean
    evaluate: Evaluation = classification
    evaluated_at: tuple[float, ...] = ()  # parts of the training, such as (0.5, 1); () is after every epoch
    watch: Evaluation | None = None  # at every 20th of the training
    metric: str = "accuracy"  # the one that the progress bar shows
    kappa_samples: int = 1000  # training samples on which kappa is measured after an epoch
