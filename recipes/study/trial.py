"""Trains one network of the study, and measures it."""

import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, asdict, dataclass, fields, replace
from functools import partial
from operator import itemgetter
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer
from torchmetrics.functional.classification import multiclass_calibration_error

from fam_optim import dataset_relative_flatness, weight_layers
from recipes.engine.batches import ordered
from recipes.engine.loop import Conditions, Loop
from recipes.engine.optimizers import GAUSS_NEWTON
from recipes.engine.task import Batch, Metrics, Samples, Source, classification, predictions
from recipes.study.methods import METHODS, add_hooks, make_optimizer
from recipes.tasks import load_task
from recipes.tasks.small import DEPTH, WIDTH

FLATTENING = "flattening"  # the variant in which kappa is measured along the training
KAPPA_EVERY = 5  # epochs
EVALUATED = 500  # samples at a time
DATA = Source(download=True)


@dataclass(frozen=True)
class Trial:
    """Everything that decides the result of a training."""

    task: str
    noise: float  # fraction of wrong labels
    method: str
    value: float
    seed: int
    epochs: int
    lr: float
    weight_decay: float
    width: int = WIDTH  # of the hidden layers
    depth: int = DEPTH  # hidden layers
    batch_size: int = 64
    base: str = "sgd"
    every: int = 10  # steps from one proximal step to the next
    variant: str = ""  # names what differs on purpose from the task's ordinary training
    tested: bool = False  # whether test data are looked at


def missing(results: Iterable[Mapping[str, Any]], trials: Iterable[Trial]) -> list[Trial]:
    """Returns the trials that were not measured yet."""
    done = {identity(r) for r in results}
    return [one for one in dict.fromkeys(trials) if identity(asdict(one)) not in done]


def measured(results: Iterable[dict[str, Any]], trials: Iterable[Trial]) -> list[dict[str, Any]]:
    """Returns the results of these trials; others may be left from an earlier choice."""
    wanted = {identity(asdict(one)) for one in trials}
    return [r for r in results if identity(r) in wanted]


identity = itemgetter(*(field.name for field in fields(Trial)))  # the fields that tell whose result it is
DEFAULTS = {field.name: field.default for field in fields(Trial) if field.default is not MISSING}


def shortened(result: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a result without the fields that have their default."""
    return {key: value for key, value in result.items() if key not in DEFAULTS or value != DEFAULTS[key]}


def filled(result: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a shortened result with its defaults again."""
    return {**DEFAULTS, **result}


def loop_of(trial: Trial, source: Source = DATA) -> Loop:
    """Returns the network with its optimizer and samples; noise hits all labels but the test's."""
    method, arguments = METHODS[trial.method], {"noise": trial.noise}
    if not trial.task.startswith("reviews"):
        arguments |= {"width": trial.width, "depth": trial.depth}
    task = load_task(trial.task, **arguments)
    if method.kind == "smoothing":
        task = replace(task, loss=partial(cross_entropy, label_smoothing=trial.value))

    def make(model: nn.Module) -> Optimizer:
        add_hooks(method, trial.value, model)
        settings = {"lr": trial.lr, "weight_decay": trial.weight_decay}
        return make_optimizer(method, trial.value, model, trial.base, trial.seed, trial.every, **settings)

    return Loop(task, Conditions(trial.seed, trial.epochs, trial.batch_size, source), make)


def run(trial: Trial, source: Source = DATA) -> dict[str, Any]:
    """Trains as the trial says; returns its fields and what was measured (nan where it diverged)."""
    begin = time.perf_counter()
    result: dict[str, Any] = {**asdict(trial), "validation": math.nan}
    loop = loop_of(trial, source)
    try:
        for epoch, _ in loop.epochs():
            if trial.variant == FLATTENING and (epoch == 1 or epoch % KAPPA_EVERY == 0):
                result.setdefault("kappas", {})[epoch] = kappas(loop)
        result["validation"] = evaluated(loop, loop.data.evaluation["validation"])[0]
    except RuntimeError as error:  # FAM refuses a step that is not finite
        if "not finite" not in str(error):
            raise
    if trial.tested:
        for name, samples in (("train", loop.data.train), ("test", loop.data.evaluation["test"])):
            score, loss = evaluated(loop, samples)
            result |= {f"{name}_score": score, f"{name}_loss": loss}
        if loop.task.evaluate is classification:
            result |= loop.evaluate(calibration, loop.data.evaluation["test"], EVALUATED)
    return {**result, "seconds": time.perf_counter() - begin}


def evaluated(loop: Loop, samples: Samples) -> list[Any]:
    """Returns the network's score, in percent, and its loss."""
    return [*loop.evaluate(loop.task.evaluate, samples, EVALUATED).values()]


def calibration(model: nn.Module, batches: Iterable[Batch]) -> Metrics:
    """Returns how far predicted probabilities are from frequencies, in percent; nothing if not finite."""
    logits, labels = predictions(model, batches)
    if not logits.isfinite().all():
        return {}
    error = multiclass_calibration_error(logits.softmax(1), labels, logits.shape[1], n_bins=15)
    return {"test_ece": 100 * error.item()}


def kappas(loop: Loop) -> list[float]:
    """Returns Gauss-Newton kappa of every layer on the training data."""
    batches, probes = ordered(loop.data.train, EVALUATED), torch.Generator().manual_seed(0)
    options: dict[str, Any] = {**GAUSS_NEWTON, "n_samples": 4, "generator": probes}
    return [
        dataset_relative_flatness(loop.model, layer, loop.task.loss, batches, **options).item()
        for layer in weight_layers(loop.model)
    ]
