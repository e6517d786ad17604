"""Trains one network of the study, and measures it."""

import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any

import torch
from pytorch_optimizer import SAM, LookSAM
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from torchmetrics.functional.classification import multiclass_calibration_error

from fam_optim import dataset_relative_flatness, weight_layers
from recipes.engine.batches import of_epoch, ordered
from recipes.engine.task import Batch, Samples
from recipes.engine.training import seed_everything
from recipes.study.methods import METHODS, add_hooks, make_optimizer
from recipes.study.tasks import LOSSES, TASKS, samples

FLATTENING = "flattening"  # the variant in which kappa is measured along the training
KAPPA_EVERY = 5  # epochs


@dataclass(frozen=True)
class Trial:
    """All that decides what comes out of a training."""

    task: str
    noise: float  # part of the labels that are wrong
    method: str
    value: float
    seed: int
    epochs: int
    lr: float
    weight_decay: float
    width: int = 128  # of the hidden layers
    depth: int = 2  # hidden layers
    batch_size: int = 64
    base: str = "sgd"
    every: int = 10  # steps from one proximal step to the next
    variant: str = ""  # name of what differs from the task's ordinary training, if that is on purpose
    tested: bool = False  # whether test data are looked at


def missing(results: Iterable[Mapping[str, Any]], trials: Iterable[Trial]) -> list[Trial]:
    """The trials that were not measured yet."""
    done = {identity(r) for r in results}
    return [one for one in dict.fromkeys(trials) if identity(asdict(one)) not in done]


def measured(results: Iterable[dict[str, Any]], trials: Iterable[Trial]) -> list[dict[str, Any]]:
    """The results of these trials; others may be left from an earlier choice."""
    wanted = {identity(asdict(one)) for one in trials}
    return [r for r in results if identity(r) in wanted]


def identity(result: Mapping[str, Any]) -> tuple[Any, ...]:
    """The fields of a result that make it the trial's."""
    return tuple(result[field.name] for field in fields(Trial))


DEFAULTS = {field.name: field.default for field in fields(Trial) if field.default is not MISSING}


def shortened(result: Mapping[str, Any]) -> dict[str, Any]:
    """A result without the fields that have their default."""
    return {key: value for key, value in result.items() if key not in DEFAULTS or value != DEFAULTS[key]}


def filled(result: Mapping[str, Any]) -> dict[str, Any]:
    """The result again."""
    return {**DEFAULTS, **result}


class Stepper:
    """A trial's network with its optimizer."""

    def __init__(self, trial: Trial) -> None:
        method, value = METHODS[trial.method], trial.value
        self.model = TASKS[trial.task].network(trial.width, trial.depth)
        add_hooks(method, value, self.model)
        settings = {"lr": trial.lr, "weight_decay": trial.weight_decay}
        self.optimizer = make_optimizer(
            method, value, self.model, trial.base, trial.seed, trial.every, **settings
        )
        smoothing = {"label_smoothing": value} if method.kind == "smoothing" else {}
        self._loss, self._options = LOSSES[TASKS[trial.task].predicts], smoothing

    def step(self, inputs: Tensor, targets: Tensor) -> None:
        """One step on a batch."""

        def closure() -> Tensor:
            self.optimizer.zero_grad()
            loss: Tensor = self._loss(self.model(inputs), targets, **self._options)
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        if self._wants_gradient_first():
            closure()
        self.optimizer.step(closure)  # type: ignore[arg-type]

    def _wants_gradient_first(self) -> bool:
        """Whether the optimizer's next step begins with the gradient at the weights."""
        if isinstance(self.optimizer, LookSAM):
            step: int = self.optimizer.get_step()  # type: ignore[no-untyped-call]
            return step % self.optimizer.k == 0
        return isinstance(self.optimizer, SAM)


def run(trial: Trial) -> dict[str, Any]:
    """Train as the trial says: its fields and what was measured; None for what is not a finite number."""
    begin = time.perf_counter()
    result: dict[str, Any] = {**asdict(trial), "validation": math.nan}
    data = samples(trial.task, trial.noise, trial.seed)
    seed_everything(trial.seed)
    stepper = Stepper(trial)
    steps = trial.epochs * len(batches(trial, data.train, 0))
    factor = TASKS[trial.task].schedule
    schedule = LambdaLR(stepper.optimizer, lambda step: factor(step / steps))
    score = SCORES[TASKS[trial.task].predicts]
    for epoch in range(1, trial.epochs + 1):
        seed_everything(trial.seed, epoch)
        stepper.model.train()
        try:
            for inputs, targets in batches(trial, data.train, epoch):
                stepper.step(inputs, targets)
                schedule.step()
            if trial.variant == FLATTENING and (epoch == 1 or epoch % KAPPA_EVERY == 0):
                result.setdefault("kappas", {})[epoch] = kappas(trial, stepper.model, data.train)
        except RuntimeError as error:  # FAM refuses a step that is not finite
            if "not finite" not in str(error):
                raise
            break
    else:
        result["validation"] = score(*predict(stepper.model, data.evaluation["validation"]))
    if trial.tested:
        result |= measure(trial, stepper.model, data.train, data.evaluation["test"])
    return {**result, "seconds": time.perf_counter() - begin}


def batches(trial: Trial, train: Samples, epoch: int) -> DataLoader[Batch]:
    """The training samples in the order of an epoch, the same for every method."""
    return of_epoch(train, trial.batch_size, trial.seed, epoch)


@torch.no_grad()
def predict(model: nn.Module, chosen: Samples) -> tuple[Tensor, Tensor]:
    """Outputs and targets, in eval mode."""
    model.eval()
    pairs = [(model(inputs), targets) for inputs, targets in ordered(chosen, 500)]
    return torch.cat([pair[0] for pair in pairs]), torch.cat([pair[1] for pair in pairs])


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """In percent."""
    return 100 * (logits.argmax(1) == labels).float().mean().item()


def explained(outputs: Tensor, targets: Tensor) -> float:
    """Part of the targets' variance that is explained (R^2), in percent."""
    residual = (outputs - targets).square().mean() / targets.var(correction=0)
    return 100 * (1 - residual.item())


SCORES = {"classes": accuracy, "numbers": explained}


def measure(trial: Trial, model: nn.Module, train: Samples, test: Samples) -> dict[str, float]:
    """Scores, losses, and calibration of a trained network."""
    task = TASKS[trial.task]
    score, loss = SCORES[task.predicts], LOSSES[task.predicts]
    result: dict[str, float] = {}
    for name, chosen in (("train", train), ("test", test)):
        outputs, targets = predict(model, chosen)
        result |= {f"{name}_score": score(outputs, targets), f"{name}_loss": loss(outputs, targets).item()}
    if task.predicts == "classes" and outputs.isfinite().all():
        ece = multiclass_calibration_error(outputs.softmax(1), targets, outputs.shape[1], n_bins=15)
        result["test_ece"] = 100 * ece.item()
    return result


def kappas(trial: Trial, model: nn.Module, train: Samples) -> list[float]:
    """Gauss-Newton kappa of every layer on the training data."""
    model.eval()
    loss, probes = LOSSES[TASKS[trial.task].predicts], torch.Generator().manual_seed(0)
    options: dict[str, Any] = {"curvature": "gauss_newton", "mode": "hutchinson", "n_samples": 4}
    return [
        dataset_relative_flatness(model, layer, loss, ordered(train, 500), generator=probes, **options).item()
        for layer in weight_layers(model)
    ]
