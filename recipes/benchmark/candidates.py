"""The training steps that the benchmark compares: of FAM, of SAM, and with what else computes Hessians.

A candidate is data: how its step is built, which number it computes by the way, and the rows it fits.
"Value only" candidates make the plain step and estimate Tr(H) of the layer's weight besides, with one probe
as FAM's hutchinson. They regularise nothing: that is what knowing the number costs, not training with it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from pytorch_optimizer import SAM
from torch import Tensor, nn

from fam_optim import FAM, observe, relative_flatness
from recipes.benchmark.cases import TASKS, Task

LAM = 1e-3  # any positive value costs the same
BASE: dict[str, Any] = {"lr": 1e-3, "momentum": 0.9}
GAUSS_NEWTON: dict[str, Any] = {"curvature": "gauss_newton", "mode": "hutchinson"}
Step = Callable[[], Any]
Build = Callable[[Task], Step]


@dataclass(frozen=True)
class Candidate:
    """A training step.

    Attributes:
        build: makes it for a task.
        draws: its kappa (or trace) of a task, so many times if it is random, otherwise once.
        reads: which number that is: "kappa", "trace" (Tr(H)) or "Gauss-Newton" (kappa of that curvature).
        rows: the tasks that it fits; None for all.
        package: what must be installed.
    """

    build: Build
    draws: Callable[[Task, int], Sequence[float]] | None = None
    reads: str = "kappa"
    rows: frozenset[str] | None = None
    package: str = "torch"

    @property
    def available(self) -> bool:
        """Whether its package is installed."""
        return find_spec(self.package) is not None


def plain(task: Task) -> Step:
    """The base optimizer's step, with a closure."""
    optimizer = torch.optim.SGD(task.model.parameters(), **BASE)
    return lambda: optimizer.step(_closure(task, optimizer))


def _closure(task: Task, optimizer: torch.optim.Optimizer) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = task.loss()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    return closure


def fam(rows: frozenset[str] | None = None, **options: Any) -> Candidate:
    """The same with FAM."""

    def build(task: Task) -> Step:
        optimizer = FAM(task.model.parameters(), torch.optim.SGD, task.layer, LAM, **options, **BASE)
        return lambda: optimizer.step(_closure(task, optimizer))

    def draws(task: Task, probes: int) -> list[float]:
        times = probes if mode == "hutchinson" else 1
        return flatness(task, times, mode=mode, curvature=curvature)

    mode, curvature = options.get("mode", "exact"), options.get("curvature", "hessian")
    reads = "kappa" if curvature == "hessian" else "Gauss-Newton"
    return Candidate(build, None if options.get("detach_hessian") else draws, reads, rows)


def flatness(task: Task, times: int = 1, **options: Any) -> list[float]:
    """The library's number, of the same forward whatever the options: dropout is seeded."""
    torch.manual_seed(0)
    layers = task.layer if isinstance(task.layer, list) else [task.layer]
    with ExitStack() as stack:
        observed = [stack.enter_context(observe(layer)) for layer in layers]
        loss = task.loss()
    return [relative_flatness(loss, observed, **options).item() for _ in range(times)]


def sam(**options: Any) -> Candidate:
    """SAM as its authors use it: a gradient at the weights, and one at the perturbed weights."""

    def build(task: Task) -> Step:
        optimizer = SAM(task.model.parameters(), torch.optim.SGD, rho=0.05, **options, **BASE)
        closure = _closure(task, optimizer)

        def step() -> None:
            closure()
            optimizer.step(closure)  # type: ignore[arg-type]

        return step

    return Candidate(build)


def appendix(
    hessian: Callable[[Callable[[Tensor], Tensor], Tensor], Tensor], rows: frozenset[str]
) -> Candidate:
    """The paper's appendix: the layer's whole Hessian ``(d, m, d, m)`` by autograd, then its blocks' traces.

    Only for a layer that is last: the loss as a function of its weight is rebuilt from its input.
    """

    def terms(task: Task) -> tuple[Tensor, Tensor]:
        kept: list[Tensor] = []
        handle = task.only.register_forward_pre_hook(lambda module, inputs: kept.append(inputs[0]))
        loss = task.loss()
        handle.remove()

        def of_weight(w: Tensor) -> Tensor:
            logits = nn.functional.linear(kept[0], w, task.only.bias)  # type: ignore[arg-type]
            return task.loss_fn(logits, task.targets)

        weight = task.weight
        blocks = torch.einsum("stut->su", hessian(of_weight, weight))
        return loss, (weight @ weight.T * blocks).sum()

    def build(task: Task) -> Step:
        optimizer = torch.optim.SGD(task.model.parameters(), **BASE)

        def step() -> None:
            optimizer.zero_grad()
            loss, kappa = terms(task)
            (loss + LAM * kappa).backward()  # type: ignore[no-untyped-call]
            optimizer.step()

        return step

    def draws(task: Task, probes: int) -> list[float]:
        torch.manual_seed(0)
        return [terms(task)[1].item()]

    return Candidate(build, draws, rows=rows)


def vectorised(of_weight: Callable[[Tensor], Tensor], weight: Tensor) -> Tensor:
    """All rows in one batched backward."""
    hessian: Tensor = torch.autograd.functional.hessian(  # type: ignore[no-untyped-call]
        of_weight, weight, create_graph=True, vectorize=True
    )
    return hessian


def loop(of_weight: Callable[[Tensor], Tensor], weight: Tensor) -> Tensor:
    """One backward per row."""
    gradient = torch.autograd.grad(of_weight(weight), weight, create_graph=True)[0].flatten()
    rows = [torch.autograd.grad(gradient[k], weight, create_graph=True)[0] for k in range(len(gradient))]
    return torch.stack(rows).view(*weight.shape, *weight.shape)


def value_only(
    traces: Callable[[Task, int], Sequence[float]], rows: frozenset[str], package: str
) -> Candidate:
    """The plain step, then one probe of another package's trace of the layer's Hessian."""

    def build(task: Task) -> Step:
        train = plain(task)

        def step() -> None:
            train()
            draws(task, 1)

        return step

    def draws(task: Task, probes: int) -> Sequence[float]:
        with layer_alone(task):
            return traces(task, probes)

    return Candidate(build, draws, "trace", rows, package)


@contextmanager
def layer_alone(task: Task) -> Iterator[None]:
    """The layer's weight as the only thing that is trained, and dropout and batch statistics at rest."""
    training = [module for module in task.model.modules() if module.training]
    others = [p for p in task.model.parameters() if p.requires_grad and p is not task.weight]
    task.model.zero_grad()
    task.model.eval()
    for parameter in others:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        task.model.zero_grad()  # a gradient with a graph would keep itself alive
        for parameter in others:
            parameter.requires_grad_()
        for module in training:
            module.training = True


def curvlinops_traces(task: Task, probes: int) -> list[float]:
    """By HessianLinearOperator: forward over reverse, with the whole network's forward for each probe."""
    from curvlinops import HessianLinearOperator, hutchinson_trace

    operator = HessianLinearOperator(
        task.model,
        nn.CrossEntropyLoss(),
        [task.weight],
        [(task.inputs, task.targets)],
        check_deterministic=False,
        num_data=1,  # one batch is all
        batch_size_fn=lambda inputs: 1,
    )
    return [float(hutchinson_trace(operator, num_matvecs=1)) for _ in range(probes)]


def pyhessian_traces(task: Task, probes: int) -> list[float]:
    """By PyHessian: one differentiable gradient, and its derivative for each probe.

    It takes all parameters that require gradients, which are this layer's weight alone (`layer_alone`).
    """
    from pyhessian import hessian

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Using backward.. with create_graph=True")
        computation = hessian(
            task.model,
            task.loss_fn,
            data=(task.inputs, task.targets),
            cuda=task.targets.is_cuda,
        )
    traces: list[float] = computation.trace(maxIter=probes, tol=-float("inf"))  # never stops early
    return traces


HEADS = frozenset({"resnet18 head 10x512", "bert-small classifier 2x512"})
TINY = frozenset({"tiny 16x16"})
CLASSIFIERS = (
    HEADS | TINY | {"efficientnet head 100x256", "imagenet head 1000x2048", "bert-small pooler 512x512"}
)
SEVERAL = frozenset(
    {
        "resnet18 last conv and head",
        "resnet18 all layers",
        "perceptron 4x1024 all layers",
        "vit all layers",
    }
)
ONE = frozenset(TASKS) - SEVERAL
INNER = SEVERAL | {
    "wide resnet penultimate 64x256",
    "bert-small pooler 512x512",
    "small conv net hidden 128x1568",
    "vit mlp 192x768",
    "vit middle mlp 192x768",
    "resnet18 last conv 512x4608",
    "tiny 16x16",
}

CANDIDATES: dict[str, Candidate] = {
    "plain": Candidate(plain),
    "FAM exact": fam(ONE),
    "FAM exact, detached": fam(ONE, detach_hessian=True),
    "FAM hutchinson": fam(ONE, mode="hutchinson"),
    "FAM hutchinson, detached": fam(ONE, mode="hutchinson", detach_hessian=True),
    "FAM Gauss-Newton": fam(INNER, **GAUSS_NEWTON),
    "FAM Gauss-Newton, detached": fam(INNER, **GAUSS_NEWTON, detach_hessian=True),
    "FAM full": fam(mode="full", rows=HEADS | TINY),
    "SAM": sam(),
    "ASAM": sam(adaptive=True),
    "vectorised Hessian": appendix(vectorised, HEADS | TINY),
    "autograd-loop Hessian": appendix(loop, TINY | {"bert-small classifier 2x512"}),
    "curvlinops trace (value only)": value_only(curvlinops_traces, CLASSIFIERS, "curvlinops"),
    "PyHessian trace (value only)": value_only(pyhessian_traces, CLASSIFIERS, "pyhessian"),
}


def chosen(labels: Sequence[str], row: str) -> dict[str, Candidate]:
    """Those of the candidates that fit the row and whose package is there; plain always."""
    return {
        label: candidate
        for label, candidate in CANDIDATES.items()
        if (label in labels or label == "plain")
        and candidate.available
        and (candidate.rows is None or row in candidate.rows)
    }
