"""A task is the data, network, loss and settings of an experiment. ``recipes.engine.loop`` trains it.

It says where the samples come from, the network and the layers whose flatness counts, the loss, what is
evaluated, and the settings of the optimizers. A new experiment is a new ``Task``, not a new script.
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
    """Raised if data or a package that a task needs is missing; one sentence says what to do."""


@dataclass(frozen=True)
class Source:
    """Where a task takes its data from, as asked on the command line."""

    folder: Path = Path("data")  # real data sets, one folder each
    download: bool = False  # fetch what is missing
    smoke: bool = False  # the same code with a small network and a few generated or shipped samples


def package(name: str, extra: str = "paper") -> Any:
    """Imports an optional package. Raises Missing if it is not installed."""
    try:
        return import_module(name)
    except ImportError as error:
        raise Missing(f'{error.name or name} is not installed: pip install -e ".[{extra}]"') from error


def missing(name: str, folder: Path, source: Source, otherwise: str = "") -> Missing:
    """Returns the error to raise where reading a data set failed."""
    if source.download:
        return Missing(f"{name} could not be downloaded into {folder}: check the connection{otherwise}")
    return Missing(f"{name} is not in {folder}: let --download fetch it{otherwise}")


@dataclass(frozen=True)
class Data:
    """The samples of a task, ready for a loader."""

    train: Samples
    evaluation: Mapping[str, Samples]  # by name, such as "validation" and "test"


def mean(value: float | list[float]) -> float:
    """Returns a metric as one number, the mean if it has a value per sample."""
    return statistics.fmean(value) if isinstance(value, list) else value


@torch.no_grad()
def predictions(model: nn.Module, batches: Iterable[Batch]) -> tuple[Tensor, Tensor]:
    """Returns outputs and targets, for a model in eval mode."""
    pairs = [(model(inputs).float(), targets) for inputs, targets in batches]
    return torch.cat([pair[0] for pair in pairs]), torch.cat([pair[1] for pair in pairs])


def classification(model: nn.Module, batches: Iterable[Batch]) -> Metrics:
    """Returns accuracy in percent and mean negative log-likelihood."""
    logits, targets = predictions(model, batches)
    accuracy = 100 * (logits.argmax(1) == targets).float().mean().item()
    return {"accuracy": accuracy, "nll": nn.functional.cross_entropy(logits, targets).item()}


def regression(model: nn.Module, batches: Iterable[Batch]) -> Metrics:
    """Returns the explained part of the targets' variance (R^2), in percent, and the mean squared error."""
    outputs, targets = predictions(model, batches)
    residual = (outputs - targets).square().mean() / targets.var(correction=0)
    return {"explained": 100 * (1 - residual.item()), "mse": nn.functional.mse_loss(outputs, targets).item()}


@dataclass(frozen=True)
class Task:
    """An experiment; if it is one of the paper's, its settings are the paper's."""

    data: Callable[[Source, int], Data]  # (source, seed); raises Missing
    model: Callable[[Source], nn.Module]  # maps a batch's inputs to the loss's outputs
    layers: tuple[str, ...]  # names of the modules whose relative flatness FAM regularises, or "all", ...
    epochs: int
    batch_size: int
    name: str = ""  # the key in recipes.tasks.TASKS, where `about` stands too
    about: str = ""  # what is trained on what, and where the paper has it
    base: str = "sgd"  # the optimizer inside SAM, ASAM and FAM: a name in recipes.engine.optimizers.BASES
    options: Mapping[str, Any] = field(default_factory=dict)  # of the base optimizer
    methods: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # by --optimizer, what it changes
    schedule: Callable[[float], float] = cosine  # factor of the learning rate by progress in [0, 1)
    loss: Callable[[Any, Any], Tensor] = nn.functional.cross_entropy  # (outputs, targets) -> () mean
    evaluate: Evaluation = classification
    evaluated_at: tuple[float, ...] = ()  # parts of the training, such as (0.5, 1); () is after every epoch
    watch: Evaluation | None = None  # a quick evaluation, at every 20th of the training
    metric: str = "accuracy"  # the one that the lines of progress show
    kappa_samples: int = 1000  # training samples on which kappa is measured after an epoch
