"""Trains one network of the study, and measures it."""

import copy
import math
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from pytorch_optimizer import SAM
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader
from torchmetrics.functional.classification import multiclass_calibration_error

from fam_optim import dataset_relative_flatness, weight_layers
from recipes.engine.batches import first, of_epoch, ordered
from recipes.engine.schedules import cosine
from recipes.engine.task import Batch, Samples
from recipes.engine.training import seed_everything
from recipes.study.methods import METHODS, add_hooks, make_optimizer
from recipes.study.tasks import LOSSES, SHIFTS, TASKS, samples, shifted

EVALUATIONS = 10  # on the validation data, evenly over the training
FLATNESS_SAMPLES = 1000  # training samples on which kappa is measured
SHIFTED_SAMPLES = 1000  # test samples that are disturbed


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
    clip: float = 0.0  # largest norm of the whole gradient; 0: any
    variant: str = ""  # name of what differs from the task's ordinary training, if that is on purpose
    tested: bool = False  # whether test data are looked at


class Stepper:
    """A trial's network with its optimizer."""

    def __init__(self, trial: Trial) -> None:
        method, value = METHODS[trial.method], trial.value
        self.model = TASKS[trial.task].network(trial.width, trial.depth)
        add_hooks(method, value, self.model)
        self.optimizer = make_optimizer(
            method, value, self.model, trial.base, trial.seed, trial.lr, trial.weight_decay
        )
        smoothing = {"label_smoothing": value} if method.kind == "smoothing" else {}
        self._loss, self._options = LOSSES[TASKS[trial.task].predicts], smoothing
        self._clip = trial.clip
        self.averaged = None
        if method.kind == "average":
            average = get_ema_multi_avg_fn(value)  # type: ignore[no-untyped-call]
            self.averaged = AveragedModel(self.model, multi_avg_fn=average, use_buffers=True)

    @property
    def evaluated(self) -> nn.Module:
        """The network that is validated and tested."""
        return self.model if self.averaged is None else self.averaged.module

    def step(self, inputs: Tensor, targets: Tensor) -> None:
        """One step on a batch."""

        def closure() -> Tensor:
            self.optimizer.zero_grad()
            loss: Tensor = self._loss(self.model(inputs), targets, **self._options)
            loss.backward()  # type: ignore[no-untyped-call]
            if self._clip:
                nn.utils.clip_grad_norm_(self.model.parameters(), self._clip)
            return loss

        if isinstance(self.optimizer, SAM):  # which wants the gradient at the weights first
            closure()
        self.optimizer.step(closure)  # type: ignore[arg-type]
        if self.averaged is not None:
            self.averaged.update_parameters(self.model)


def run(trial: Trial) -> dict[str, Any]:
    """Train as the trial says: its fields and what was measured; None for what is not a finite number."""
    begin = time.perf_counter()
    data = samples(trial.task, trial.noise, trial.seed)
    seed_everything(trial.seed)
    stepper = Stepper(trial)
    evaluated = stepper.evaluated
    steps = trial.epochs * len(batches(trial, data.train, 0))
    schedule = LambdaLR(stepper.optimizer, lambda step: cosine(step / steps))
    every = max(1, trial.epochs // EVALUATIONS)
    score = SCORES[TASKS[trial.task].predicts]
    validation, best = [-math.inf], copy.deepcopy(evaluated.state_dict())
    for epoch in range(1, trial.epochs + 1):
        seed_everything(trial.seed, epoch)
        stepper.model.train()
        try:
            for inputs, targets in batches(trial, data.train, epoch):
                stepper.step(inputs, targets)
                schedule.step()
        except RuntimeError as error:  # FAM refuses a step that is not finite
            if "not finite" not in str(error):
                raise
            validation.append(math.nan)
            break
        last = epoch == trial.epochs
        if last or (trial.tested and (trial.epochs - epoch) % every == 0):
            validation.append(score(*predict(evaluated, data.evaluation["validation"])))
            if trial.tested and validation[-1] == max(validation):
                best = copy.deepcopy(evaluated.state_dict())
    result = {**asdict(trial), "validation": validation[-1]}
    if trial.tested:
        test = data.evaluation["test"]
        result |= measure(trial, evaluated, data.train, test)
        evaluated.load_state_dict(best)
        result["best_test_score"] = score(*predict(evaluated, test))
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
    """Scores, losses, calibration, robustness and flatness of a trained network."""
    task = TASKS[trial.task]
    score, loss = SCORES[task.predicts], LOSSES[task.predicts]
    result: dict[str, float] = {}
    for name, chosen in (("train", train), ("test", test)):
        outputs, targets = predict(model, chosen)
        result |= {f"{name}_score": score(outputs, targets), f"{name}_loss": loss(outputs, targets).item()}
    if task.predicts == "classes" and outputs.isfinite().all():
        ece = multiclass_calibration_error(outputs.softmax(1), targets, outputs.shape[1], n_bins=15)
        result["test_ece"] = 100 * ece.item()
    if task.shifted:
        inputs, labels = next(iter(ordered(test, SHIFTED_SAMPLES)))
        for kind, strengths in SHIFTS.items():
            with torch.no_grad():
                scores = [accuracy(model(shifted(inputs, kind, s)), labels) for s in strengths]
            result[f"{kind}_score"] = sum(scores) / len(scores)
    return result if of_images(train) else result | flatness(trial, model, train)


def of_images(train: Samples) -> bool:
    """Its convolutions' kappas take long to measure, and are not reported."""
    inputs, _ = next(iter(ordered(train, 1)))
    return bool(inputs.dim() > 2)


def flatness(trial: Trial, model: nn.Module, train: Samples) -> dict[str, float]:
    """Gauss-Newton kappa of every layer, one after the other, and the squared norms of their weights."""
    loss = LOSSES[TASKS[trial.task].predicts]
    probes = torch.Generator().manual_seed(0)
    values: dict[str, Any] = {"kappas": [], "norms": []}
    for layer in weight_layers(model):
        kappa = dataset_relative_flatness(
            model,
            layer,
            loss,
            ordered(first(train, FLATNESS_SAMPLES), 500),
            curvature="gauss_newton",
            mode="hutchinson",
            n_samples=4,
            generator=probes,
        )
        values["kappas"].append(kappa.item())
        assert isinstance(layer, nn.Linear)
        values["norms"].append(layer.weight.square().sum().item())
    return values
