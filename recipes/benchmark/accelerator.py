"""Measures what is worth measuring on a GPU, in one command of at most ten minutes.

Each network is measured in float32, in bfloat16, and in bfloat16 compiled. In float32 kappa is compared with
the CPU's. Every step is made once under ``torch.cuda.set_sync_debug_mode("error")``, which finds the steps
that make the host wait for the device. Then the steps are timed in turns. Their peak memory is measured too.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from recipes.benchmark.candidates import CANDIDATES, PENALTY, Candidate, Step
from recipes.benchmark.cases import bert, hidden, images, perceptron, resnet50, vit
from recipes.benchmark.check import seeded
from recipes.benchmark.measuring import prepared, timings
from recipes.shared.problem import Problem
from recipes.shared.results import CPU
from recipes.shared.timing import repeated
from recipes.tasks.models import resnet18_cifar

LIMIT = 570.0  # seconds for everything; a row that would take longer is left out
RESERVE = {"float32": 40.0, "bfloat16": 40.0, "bfloat16, compiled": 120.0}  # seconds that a row may need
TIMING = 12.0  # seconds for the rounds of a row
TOLERANCE = 1e-3  # of kappa, relative to the CPU's, in float32 without TF32
COLUMNS = {
    **{label: CANDIDATES[label] for label in ("plain", "FAM proximal", "SAM")},
    "FAM exact": Candidate("the penalty of the last layer", {**PENALTY, "layers": ["last"]}),
}
# A penalty would have to be built before the compiled model runs first, and the plain step runs it first.
COMPILED = ("plain", "FAM proximal")
NETWORKS = {
    "ResNet-18": partial(images, resnet18_cifar, hidden, 256),
    "ResNet-50": partial(images, resnet50, hidden, 64, 224, 1000),
    "BERT-small": partial(bert, hidden, 64),
    "vision transformer": partial(vit, hidden),
}
SMOKE = {"a": partial(perceptron, hidden, 8, 6, 5, 4), "b": partial(perceptron, hidden, 8, 9, 9, 3)}


class Autocast(nn.Module):
    """A model whose forward runs in bfloat16."""

    def __init__(self, model: nn.Module, device: str) -> None:
        super().__init__()
        self.model, self.device = model, device

    def forward(self, x: Tensor) -> Any:
        with torch.autocast(self.device, torch.bfloat16):
            return self.model(x)


def measure(device: torch.device, *, smoke: bool = False) -> Iterator[dict[str, Any]]:
    """Yields a row per network and precision, the compiled ones last, until the time is over."""
    end, networks = time.perf_counter() + LIMIT, SMOKE if smoke else NETWORKS
    for (precision, reserve), (name, network) in product(RESERVE.items(), networks.items()):
        row: dict[str, Any] = {"task": f"{name}, {precision}", "candidates": {}}
        if time.perf_counter() + reserve > end:
            yield {**row, "left out": "the ten minutes were over"}
            continue
        torch.manual_seed(0)
        problem = network().copy(device=device)
        if precision == "float32":
            row["check"] = check(problem)
        else:
            problem = replace(problem, model=Autocast(problem.model, device.type))
        yield {**row, "candidates": steps(problem, device, "compiled" in precision, smoke)}


def check(problem: Problem) -> dict[str, float]:
    """Returns kappa of the last hidden layer on two samples, on the device and on the CPU."""
    part = problem.part(2).copy()
    part.model.eval()
    part = replace(part, regularised=part.layers[-1])
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        (here,), (there,) = (seeded(p, curvature="gauss_newton") for p in (part, part.copy(device=CPU)))
    return {"device": here, "cpu": there}


def steps(problem: Problem, device: torch.device, compiled: bool, smoke: bool) -> dict[str, Any]:
    """Returns for every candidate whether its step waits, its time and its peak memory."""

    def before(model: nn.Module) -> None:
        if compiled:
            model.compile(backend="eager" if smoke else "inductor")

    candidates = {name: COLUMNS[name] for name in (COMPILED if compiled else COLUMNS)}
    built, found = prepared(problem, candidates, device, before=before, counted=False)
    for label, step in built.items():
        found[label]["waits"] = what_waits(repeated(step, candidates[label].period), device)
    timed = timings(built, candidates, 0.0 if smoke else TIMING, device)
    return {label: {**own, **timed.get(label, {})} for label, own in found.items()}


def what_waits(step: Step, device: torch.device) -> str:
    """Returns why a step makes the host wait for the device; empty if it does not, or torch cannot tell."""
    set_mode = torch.cuda.set_sync_debug_mode if device.type == "cuda" else lambda mode: None
    set_mode("error")
    try:
        step()
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        return str(error)
    finally:
        set_mode("default")
    return ""


def verdict(rows: Sequence[dict[str, Any]]) -> str:
    """Returns what is wrong, in a sentence or two; empty if nothing is."""
    sentences = []
    for row in rows:
        here, there = row.get("check", {"device": 0.0, "cpu": 0.0}).values()
        if not abs(here - there) <= TOLERANCE * abs(there):
            sentences.append(f"{row['task']}: expected the CPU's kappa {there}, got {here}.")
        waiting = [label for label, result in row["candidates"].items() if result.get("waits")]
        for label in waiting:
            if label.startswith("FAM") and "plain" not in waiting:
                sentences.append(f"{row['task']}: expected no step to wait for the device, but {label} does.")
    return " ".join(sentences)
