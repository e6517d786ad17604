"""What is worth measuring on a GPU, in one command of at most ten minutes.

    python -m recipes.benchmark --accelerator            # results in runs/benchmark/accelerator.json
    python -m recipes.benchmark --accelerator --smoke    # tiny networks, on a CPU too: does everything run?

Networks that people train there, in float32, in bfloat16, and in bfloat16 compiled. For each, kappa is
compared with the CPU's; every step is made once under ``torch.cuda.set_sync_debug_mode("error")``, which
finds those that make the host wait for the device; then the steps take turns; peak memory is measured too.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fam_optim import weight_layers
from recipes.benchmark.candidates import BASE, CANDIDATES, DETACHED, PENALTY, Candidate, Step, flatness
from recipes.benchmark.measuring import prepared, repeated, timings
from recipes.engine.optimizers import GAUSS_NEWTON
from recipes.shared.problem import Problem
from recipes.shared.results import CPU

LIMIT = 570.0  # seconds for everything; a row that would take longer is left out
RESERVE = {"float32": 40.0, "bfloat16": 40.0, "bfloat16, compiled": 120.0}  # seconds that a row may need
TIMING = 12.0  # seconds for the rounds of a row
TOLERANCE = 1e-3  # of kappa, relative to the CPU's, in float32 without TF32


def penalty(about: str, layers: str, **options: Any) -> Candidate:
    """FAM's penalty of these layers."""
    return Candidate(about, {**PENALTY, **options, "layers": [layers]})


CANDIDATES_HERE = {
    "plain": CANDIDATES["plain"],
    "FAM proximal": Candidate(
        "as recommended",
        {"optimizer": "fam", **BASE, "layers": ["hidden"], "mode": "proximal", "lam": 1.0, "every": 10},
        period=10,
    ),
    "FAM exact": penalty("the last layer", "last"),
    "FAM Gauss-Newton, detached": penalty("all layers", "all", **GAUSS_NEWTON, **DETACHED),
    "SAM": CANDIDATES["SAM"],
}
COMPILED = ("plain", "FAM proximal", "FAM exact")


class Logits(nn.Module):
    """A model of transformers' that returns its logits alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Any:
        return self.model(tokens).logits


class Autocast(nn.Module):
    """A model whose forward runs in bfloat16."""

    def __init__(self, model: nn.Module, device: str) -> None:
        super().__init__()
        self.model, self.device = model, device

    def forward(self, x: Tensor) -> Any:
        with torch.autocast(self.device, torch.bfloat16):
            return self.model(x)


def resnet18(smoke: bool) -> Problem:
    from torchvision.models import resnet18

    return _images(resnet18(num_classes=10), 2 if smoke else 256, 32, 10)


def resnet50(smoke: bool) -> Problem:
    from torchvision.models import resnet18, resnet50

    model = resnet18(num_classes=20) if smoke else resnet50()
    return _images(model, 2 if smoke else 64, 32 if smoke else 224, 20 if smoke else 1000)


def _images(model: nn.Module, number: int, size: int, classes: int) -> Problem:
    return Problem(model, [], torch.randn(number, 3, size, size), torch.randint(0, classes, (number,)))


def bert(smoke: bool) -> Problem:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig()
    if smoke:
        config = BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    model = Logits(BertForSequenceClassification(config))
    number, length = (2, 8) if smoke else (32, 128)
    return Problem(model, [], torch.randint(1000, (number, length)), torch.randint(0, 2, (number,)))


def gpt2(smoke: bool) -> Problem:
    """With the next token as the target of each; its head is tied to the embedding."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=50) if smoke else GPT2Config()
    tokens = torch.randint(config.vocab_size, (2, 8) if smoke else (4, 513))
    return Problem(Logits(GPT2LMHeadModel(config)), [], tokens[:, :-1], tokens[:, 1:])


NETWORKS: dict[str, Callable[[bool], Problem]] = {
    "ResNet-18": resnet18,
    "ResNet-50": resnet50,
    "BERT-base": bert,
    "GPT-2 small": gpt2,
}


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Of one class per row, or per token; in float32, as autocast takes it."""
    return F.cross_entropy(logits.flatten(0, -2).float(), targets.flatten())


def measure(device: torch.device, *, smoke: bool = False) -> Iterator[dict[str, Any]]:
    """A row per network and precision, the compiled ones last, until the time is over."""
    end = time.perf_counter() + LIMIT
    for precision, reserve in RESERVE.items():
        for name, network in NETWORKS.items():
            row: dict[str, Any] = {"task": f"{name}, {precision}", "candidates": {}}
            if time.perf_counter() + reserve > end:
                yield {**row, "left out": "the ten minutes were over"}
                continue
            torch.manual_seed(0)
            problem = replace(network(smoke).copy(device=device), loss_fn=cross_entropy)
            if precision == "float32":
                row["check"] = check(problem)
            else:
                problem = replace(problem, model=Autocast(problem.model, device.type))
            yield {**row, "candidates": steps(problem, device, "compiled" in precision, smoke)}


def check(problem: Problem) -> dict[str, float]:
    """kappa of the last layer on two samples, on the device and on the CPU."""
    part = problem.part(2).copy()
    part = replace(part, regularised=weight_layers(part.model)[-1:])
    part.model.eval()
    on_cpu = part.copy(device=CPU)
    exact = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        (here,), (there,) = flatness(part), flatness(on_cpu)
    finally:
        torch.backends.cudnn.allow_tf32 = exact
    return {"device": here, "cpu": there}


def steps(problem: Problem, device: torch.device, compiled: bool, smoke: bool) -> dict[str, Any]:
    """Of every candidate: whether its step waits, its time and its peak memory."""

    def before(model: nn.Module) -> None:
        if compiled:
            model.compile(backend="eager" if smoke else "inductor")

    names = COMPILED if compiled else tuple(CANDIDATES_HERE)
    candidates = {name: CANDIDATES_HERE[name] for name in names}
    built, found = prepared(problem, candidates, device, before=before, counted=False)
    for label, step in built.items():
        found[label]["waits"] = what_waits(repeated(step, candidates[label].period), device)
    for label, timed in timings(built, candidates, 0.0 if smoke else TIMING, device).items():
        found[label] |= timed
    return found


def what_waits(step: Step, device: torch.device) -> str:
    """Why a step makes the host wait for the device; empty if it does not, or torch cannot tell."""
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        return str(error)
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    return ""


def verdict(rows: Sequence[dict[str, Any]]) -> str:
    """What is wrong, in a sentence or two; empty if nothing is."""
    differing = [
        f"{row['check']['device']} on {row['task']} (the CPU: {row['check']['cpu']})"
        for row in rows
        if "check" in row
        and not abs(row["check"]["device"] - row["check"]["cpu"]) <= TOLERANCE * abs(row["check"]["cpu"])
    ]
    waiting = [
        f"{label} on {row['task']}"
        for row in rows
        for label, result in row["candidates"].items()
        if result.get("waits") and label.startswith("FAM") and not row["candidates"]["plain"].get("waits")
    ]
    sentences = []
    if differing:
        sentences.append(f"expected the CPU's kappa, got {', '.join(differing)}.")
    if waiting:
        sentences.append(f"expected no step to wait for the device, but these do: {', '.join(waiting)}.")
    return " ".join(sentences)
