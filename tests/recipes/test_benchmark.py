"""The benchmark's check of its numbers, and its counts of operations."""

from __future__ import annotations

import dataclasses
from itertools import pairwise

import pytest
import torch

from recipes.benchmark import __main__ as benchmark
from recipes.benchmark import counts
from recipes.benchmark.candidates import CANDIDATES, chosen
from recipes.benchmark.cases import TASKS, Head
from recipes.shared.problem import Problem
from tests.recipes.test_recipes import same


def head(classes: int, features: int, rows: int) -> Problem:
    model = Head(classes, features, rows)
    return Problem(model, model.head, torch.zeros(()), torch.randint(0, classes, (rows,)))


def test_a_wrong_number_ends_the_benchmark() -> None:
    task = TASKS["tiny 16x16"]()
    candidates = chosen(["FAM exact", "FAM full", "vectorised Hessian"], "tiny 16x16")
    checked = benchmark.check(task, candidates, 8)
    assert isinstance(checked, dict) and checked["FAM full"]["mean"] == pytest.approx(checked["kappa"], 1e-4)
    wrong = dataclasses.replace(CANDIDATES["FAM exact"], draws=lambda task, probes: [1.01 * checked["kappa"]])
    with pytest.raises(AssertionError, match="SAM: expected"):
        benchmark.check(task, {"SAM": wrong}, 8)


def test_a_check_leaves_the_model_as_it_was() -> None:
    task = TASKS["tiny 16x16"]()
    before = {name: value.clone() for name, value in task.model.state_dict().items()}
    benchmark.check(task, chosen(list(CANDIDATES), "tiny 16x16"), 2)
    assert same(before, dict(task.model.state_dict()))
    assert task.model.training and all(p.requires_grad and p.grad is None for p in task.model.parameters())


def test_counts_of_a_head() -> None:
    """Many classes: the head takes three products, SAM six, FAM three more, a probe two more."""
    task = head(classes=40, features=16, rows=8)
    labels = ("plain", "SAM", "FAM exact", "FAM exact, detached", "FAM hutchinson")
    found = {label: counts.step_flops(task, label) for label in labels}
    product = 2 * 40 * 16 * 8
    assert found == dict(zip(labels, (n * product for n in (3, 6, 6, 5, 5)), strict=True))


def test_counts_of_a_perceptron() -> None:
    """Gauss-Newton of all layers: a product more for the derivatives at the layers' outputs, and for each of
    the weight's and of the output's derivative of that; with a constant curvature only for the weight's."""
    widths = (6, 5, 7, 3)
    layers: list[torch.nn.Module] = [torch.nn.Linear(a, b, bias=False) for a, b in pairwise(widths)]
    model = torch.nn.Sequential(layers[0], torch.nn.Tanh(), layers[1], torch.nn.Tanh(), layers[2])
    task = Problem(model, layers, torch.randn(4, 6), torch.randint(0, 3, (4,)))
    labels = ("plain", "FAM Gauss-Newton", "FAM Gauss-Newton, detached")
    plain, whole, detached = (counts.step_flops(task, label) for label in labels)
    first, others = 2 * 4 * 6 * 5, 2 * 4 * (5 * 7 + 7 * 3)
    assert plain == 2 * first + 3 * others  # nothing below the first layer asks for its input's derivative
    assert detached == plain + 2 * (first + others)
    assert whole == plain + 3 * (first + others)
