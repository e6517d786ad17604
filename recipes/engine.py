"""Training for the recipes: one place that builds the optimizers, one loop, one evaluation.

``train_side_by_side`` trains several methods at once. They start from copies of one model, and each batch
goes through all of them before the next one is drawn. So the comparison is paired (same initialisation,
labels and order), and so is the step time: the ratio to the reference method is taken step by step on the
same batch, with the order rotating, and its median hardly notices a busy machine.
"""

import copy
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from pytorch_optimizer import SAM
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler

from fam_optim import FAM, dataset_relative_flatness
from recipes.datasets import Batches, Splits, ordered_batches, shuffled_batches

Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Method:
    """A row of a comparison: its label, the kind of optimizer, and that optimizer's own options."""

    label: str
    optimizer: str  # "sgd", "sam" or "fam"
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Run:
    """One method on its way: what is trained, and what has been measured so far."""

    method: Method
    model: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: LRScheduler
    losses: list[float] = field(default_factory=list)  # of this epoch's batches
    step_seconds: list[float] = field(default_factory=list)  # of every step
    history: dict[str, list[float]] = field(default_factory=dict)  # name -> one value per epoch

    def record(self, **values: float) -> None:
        """Append one epoch's values to the history."""
        for name, value in values.items():
            self.history.setdefault(name, []).append(value)


def build_optimizer(
    method: Method, model: nn.Module, layer: nn.Module, base: Mapping[str, Any]
) -> torch.optim.Optimizer:
    """Wrap SGD with the ``base`` options as the method wants it."""
    parameters = model.parameters()
    if method.optimizer == "sgd":
        return torch.optim.SGD(parameters, **base)
    if method.optimizer == "sam":
        return SAM(parameters, torch.optim.SGD, **method.options, **base)
    if method.optimizer == "fam":
        return FAM(parameters, torch.optim.SGD, layer=layer, **method.options, **base)
    raise ValueError(f"optimizer of {method.label!r} must be 'sgd', 'sam' or 'fam', got {method.optimizer!r}")


def train_step(run: Run, loss_fn: Loss, inputs: Tensor, targets: Tensor) -> float:
    """Take one step on one batch, with the same closure for every optimizer. Returns the plain loss."""

    def closure() -> Any:
        run.optimizer.zero_grad()
        loss = loss_fn(run.model(inputs), targets)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    if isinstance(run.optimizer, SAM):
        # pytorch_optimizer's SAM wants the gradient at the weights first; its step() calls the closure once
        # more, at the perturbed weights, and returns None. That second forward pass updates BatchNorm's
        # running statistics too. Stopping it (disable_running_stats) moved the last epoch's validation
        # accuracy by at most 0.1 (40 % noise, rho 0.05 and 0.1, two seeds), so it is used as documented.
        loss = closure()
        run.optimizer.step(closure)
    else:
        loss = run.optimizer.step(closure)  # FAM adds lam * kappa to what the closure backpropagates
    plain_loss: float = loss.item()
    return plain_loss


@torch.no_grad()
def evaluate(model: nn.Module, batches: Batches) -> tuple[float, float]:
    """Accuracy in percent and mean negative log-likelihood, in eval mode."""
    model.eval()
    logits = torch.cat([model(inputs) for inputs, _ in batches])
    targets = torch.cat([targets for _, targets in batches])
    accuracy = 100 * (logits.argmax(1) == targets).float().mean().item()
    return accuracy, nn.functional.cross_entropy(logits, targets).item()


def train_side_by_side(
    methods: Sequence[Method],
    model: nn.Module,
    layer: str,
    splits: Splits,
    *,
    epochs: int,
    batch_size: int,
    base: Mapping[str, Any],
    seed: int,
    device: torch.device,
    loss_fn: Loss = nn.functional.cross_entropy,
    on_progress: Callable[[Run], None] = lambda run: None,
) -> list[Run]:
    """Train a copy of ``model`` with every method; ``layer`` is the name of the module to regularise."""
    batches = shuffled_batches(splits.train, batch_size, seed)
    train, validation, test = (
        ordered_batches(split, device) for split in (splits.train, splits.validation, splits.test)
    )
    runs = [start(method, model, layer, epochs * len(batches), base, device) for method in methods]
    for _ in range(epochs):
        train_epoch(runs, batches, loss_fn, device, on_progress)
        for run in runs:
            val_accuracy, val_nll = evaluate(run.model, validation)
            test_accuracy, test_nll = evaluate(run.model, test)
            kappa = dataset_relative_flatness(run.model, run.model.get_submodule(layer), loss_fn, train)
            run.record(
                train_loss=statistics.fmean(run.losses),
                val_accuracy=val_accuracy,
                val_nll=val_nll,
                test_accuracy=test_accuracy,
                test_nll=test_nll,
                kappa=float(kappa),
            )
            on_progress(run)
    return runs


def start(
    method: Method, model: nn.Module, layer: str, steps: int, base: Mapping[str, Any], device: torch.device
) -> Run:
    """Copy the initial model and give the copy its optimizer, with a cosine schedule to zero."""
    model = copy.deepcopy(model).to(device)
    optimizer = build_optimizer(method, model, model.get_submodule(layer), base)
    return Run(method, model, optimizer, CosineAnnealingLR(optimizer, steps))


def train_epoch(
    runs: Sequence[Run],
    batches: Iterable[Sequence[Tensor]],
    loss_fn: Loss,
    device: torch.device,
    on_progress: Callable[[Run], None],
) -> None:
    """Send each batch through all runs, in an order that rotates with the step."""
    for run in runs:
        run.model.train()
        run.losses.clear()
    for step, (inputs, targets) in enumerate(batches):
        inputs, targets = inputs.to(device), targets.to(device)
        first = step % len(runs)
        for run in (*runs[first:], *runs[:first]):
            begin = clock(device)
            loss = train_step(run, loss_fn, inputs, targets)
            run.step_seconds.append(clock(device) - begin)
            run.schedule.step()
            run.losses.append(loss)
            on_progress(run)


def clock(device: torch.device) -> float:
    """Seconds, after everything queued on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def relative_step_time(run: Run, reference: Run) -> float:
    """Median over the steps of this run's time relative to the reference's on the same batch."""
    pairs = zip(run.step_seconds, reference.step_seconds, strict=True)
    return statistics.median(own / other for own, other in pairs)
