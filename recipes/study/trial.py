"""Trains one network of the study, and measures it."""

import math
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from pytorch_optimizer import SAM, LookSAM
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader
from torchmetrics.functional.classification import multiclass_calibration_error

from fam_optim import dataset_relative_flatness, weight_layers
from recipes.engine.batches import first, of_epoch, ordered
from recipes.engine.task import Batch, Samples
from recipes.engine.training import seed_everything
from recipes.study.methods import METHODS, add_hooks, make_optimizer
from recipes.study.tasks import LOSSES, TASKS, samples

FLATNESS_SAMPLES = 1000  # training samples on which kappa is measured


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

        if self._wants_gradient_first():
            closure()
        self.optimizer.step(closure)  # type: ignore[arg-type]
        if self.averaged is not None:
            self.averaged.update_parameters(self.model)


    def _wants_gradient_first(self) -> bool:
        """Whether the optimizer's next step begins with the gradient at the weights."""
        if isinstance(self.optimizer, LookSAM):
            return bool(self.optimizer.get_step() % self.optimizer.k == 0)
        return isinstance(self.optimizer, SAM)


def run(trial: Trial) -> dict[str, Any]:
    """Train as the trial says: its fields and what was measured; None for what is not a finite number."""
    begin = time.perf_counter()
    result: dict[str, Any] = {**asdict(trial), "validation": math.nan}
    data = samples(trial.task, trial.noise, trial.seed)
    seed_everything(trial.seed)
    stepper = Stepper(trial)
    evaluated = stepper.evaluated
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
        except RuntimeError as error:  # FAM refuses a step that is not finite
            if "not finite" not in str(error):
                raise
            break
    else:
        result["validation"] = score(*predict(evaluated, data.evaluation["validation"]))
    if trial.tested:
        result |= measure(trial, evaluated, data.train, data.evaluation["test"])
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
    """Scores, losses, calibration and flatness of a trained network."""
    task = TASKS[trial.task]
    score, loss = SCORES[task.predicts], LOSSES[task.predicts]
    result: dict[str, float] = {}
    for name, chosen in (("train", train), ("test", test)):
        outputs, targets = predict(model, chosen)
        result |= {f"{name}_score": score(outputs, targets), f"{name}_loss": loss(outputs, targets).item()}
    if task.predicts == "classes" and outputs.isfinite().all():
        ece = multiclass_calibration_error(outputs.softmax(1), targets, outputs.shape[1], n_bins=15)
        result["test_ece"] = 100 * ece.item()
    return result | flatness(trial, model, train) if trial.variant == "network" else result


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
