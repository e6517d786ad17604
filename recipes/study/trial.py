"""Trains one network of the study, and measures it."""

import copy
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader
from torchmetrics.functional.classification import multiclass_calibration_error

from fam_optim import FAM, dataset_relative_flatness
from recipes.engine.batches import first, of_epoch, ordered
from recipes.engine.optimizers import BASES, build, take_step
from recipes.engine.schedules import cosine
from recipes.engine.task import Batch, Samples
from recipes.engine.training import seed_everything
from recipes.study.methods import METHODS, Method
from recipes.study.samples import samples
from recipes.tasks.models import MultilayerPerceptron, SmallConvNet

EVALUATIONS = 10  # on the validation data, evenly over the training
FLATNESS_SAMPLES = 2000  # training samples on which flatness is measured


@dataclass(frozen=True)
class Trial:
    """All that decides what comes out of a training."""

    task: str
    method: str
    value: float
    noise: float
    seed: int
    epochs: int
    lr: float
    width: int = 128  # m, the inputs of the last layer
    batch_size: int = 64
    base: str = "sgd"
    weight_decay: float = 5e-4
    tested: bool = False  # whether test data are looked at


class Stepper:
    """A trial's network with its optimizer."""

    def __init__(self, trial: Trial) -> None:
        self.trial, self.method = trial, METHODS[trial.method]
        self.model = network(trial)
        self.head: nn.Linear = self.model.head  # type: ignore[assignment]
        self.optimizer = make_optimizer(trial, self.method, self.model)
        self.averaged = None
        if self.method.averaged:
            average = get_ema_multi_avg_fn(trial.value)  # type: ignore[no-untyped-call]
            self.averaged = AveragedModel(self.model, multi_avg_fn=average, use_buffers=True)

    @property
    def evaluated(self) -> nn.Module:
        """The network that is validated and tested."""
        return self.model if self.averaged is None else self.averaged.module

    def step(self, inputs: Tensor, targets: Tensor) -> None:
        """One step on a batch."""
        take_step(self.optimizer, self._outputs, self._loss, inputs, targets)
        if self.averaged is not None:
            self.averaged.update_parameters(self.model)

    def warm_up(self, progress: float) -> None:
        """Let lam grow, where the method has it so."""
        if self.method.warm_up and isinstance(self.optimizer, FAM):
            self.optimizer.lam = self.trial.value * min(1, progress / self.method.warm_up)

    def _outputs(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        phi = self.model.features(inputs)  # type: ignore[operator]
        return phi, self.head(phi)

    def _loss(self, outputs: tuple[Tensor, Tensor], targets: Tensor) -> Tensor:
        if self.method.loss is None:
            return cross_entropy(outputs[1], targets)
        return self.method.loss(self.trial.value, self.head, *outputs, targets)


def run(trial: Trial, folder: Path) -> dict[str, Any]:
    """Train as the trial says: its fields and what was measured."""
    begin = time.perf_counter()
    data = samples(trial.task, trial.noise, trial.seed, folder)
    seed_everything(trial.seed)
    stepper = Stepper(trial)
    evaluated = stepper.evaluated
    steps = trial.epochs * len(epoch_batches(trial, data.train, 0))
    schedule = LambdaLR(stepper.optimizer, lambda step: cosine(step / steps))
    every = max(1, trial.epochs // EVALUATIONS)
    step, accuracies, best = 0, [], copy.deepcopy(evaluated.state_dict())
    for epoch in range(1, trial.epochs + 1):
        seed_everything(trial.seed, epoch)
        stepper.model.train()
        for inputs, targets in epoch_batches(trial, data.train, epoch):
            stepper.warm_up(step / steps)
            stepper.step(inputs, targets)
            schedule.step()
            step += 1
        if (trial.epochs - epoch) % every == 0:
            accuracies.append(accuracy(*predict(evaluated, data.evaluation["validation"])))
            if accuracies[-1] == max(accuracies):
                best = copy.deepcopy(evaluated.state_dict())
    result = {**asdict(trial), "validation": accuracies[-1], "best_validation": max(accuracies)}
    if trial.tested:
        result |= measure(evaluated, data.train, data.evaluation["test"])
        evaluated.load_state_dict(best)
        result["best_test_accuracy"] = accuracy(*predict(evaluated, data.evaluation["test"]))
    return {**result, "seconds": time.perf_counter() - begin}


def network(trial: Trial) -> nn.Module:
    """A small convolutional network for images, a multilayer perceptron for vectors."""
    if trial.task.startswith("fashion"):
        return SmallConvNet(channels=(8, 16), hidden=trial.width)
    return MultilayerPerceptron(64 if trial.task == "digits" else 40, trial.width)


def make_optimizer(trial: Trial, method: Method, model: nn.Module) -> torch.optim.Optimizer:
    """The method's optimizer of the model's parameters."""
    settings = {
        "optimizer": method.optimizer or trial.base,
        "base": trial.base,
        **BASES[trial.base],
        "lr": trial.lr,
        "weight_decay": trial.weight_decay,
        **method.options,
    }
    if method.optimizer == "asam":
        settings["adaptive"] = True
    if method.option is not None:
        settings[method.option] = trial.value
    return build(settings, model, model.get_submodule("head"))


def epoch_batches(trial: Trial, train: Samples, epoch: int) -> DataLoader[Batch]:
    """The training samples in the order of an epoch, the same for every method."""
    return of_epoch(train, trial.batch_size, trial.seed, epoch)


@torch.no_grad()
def predict(model: nn.Module, chosen: Samples) -> tuple[Tensor, Tensor]:
    """Logits and labels, in eval mode."""
    model.eval()
    pairs = [(model(inputs), targets) for inputs, targets in ordered(chosen, 500)]
    return torch.cat([pair[0] for pair in pairs]), torch.cat([pair[1] for pair in pairs])


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """In percent."""
    return 100 * (logits.argmax(1) == labels).float().mean().item()


def measure(model: nn.Module, train: Samples, test: Samples) -> dict[str, float]:
    """Errors, calibration, norms and flatness of a trained network."""
    result: dict[str, float] = {}
    for name, chosen in (("train", train), ("test", test)):
        logits, labels = predict(model, chosen)
        result[f"{name}_accuracy"] = accuracy(logits, labels)
        result[f"{name}_nll"] = cross_entropy(logits, labels).item()
    p = logits.softmax(1)
    result["test_ece"] = 100 * multiclass_calibration_error(p, labels, 10, n_bins=15).item()
    result["confidence"] = 100 * p.max(1).values.mean().item()
    head: nn.Linear = model.head  # type: ignore[assignment]
    batches = list(ordered(first(train, FLATNESS_SAMPLES), 500))
    with torch.no_grad():
        phi = torch.cat([model.features(x) for x, _ in batches])  # type: ignore[operator]
    squared_norm = head.weight.square().sum().item()
    layerwise = dataset_relative_flatness(model, head, cross_entropy, batches, measure="layerwise").item()
    return result | {
        "weight_norm": squared_norm**0.5,
        "feature_norm": phi.norm(dim=1).mean().item(),
        "kappa": dataset_relative_flatness(model, head, cross_entropy, batches).item(),
        "kappa_layerwise": layerwise,
        "trace": layerwise / squared_norm,
    }
