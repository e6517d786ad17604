"""The benchmark's check of its numbers, its counts of operations, and what a block of steps is."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from recipes.benchmark import measuring, tables
from recipes.benchmark.candidates import CANDIDATES, Candidate, chosen
from recipes.benchmark.cases import CASES, head, perceptron
from recipes.benchmark.check import agreement, check
from recipes.shared.problem import Problem
from tests.recipes.test_recipes import same

CPU = torch.device("cpu")


def counted(problem: Problem, *labels: str) -> dict[str, float]:
    """Operations of a step of each."""
    _, results = measuring.prepared(problem, {label: CANDIDATES[label] for label in labels}, CPU)
    return {label: result["operations"] for label, result in results.items()}


def test_a_wrong_number_ends_the_benchmark() -> None:
    problem = CASES["tiny 16x16"].build()
    checked = check(problem, chosen(["FAM exact", "FAM Gauss-Newton"], "tiny 16x16").values(), 32)
    assert set(checked) == {"hessian", "gauss_newton"}
    exact = checked["hessian"]["exact"]
    assert exact > 0 and checked["hessian"]["mean"] == pytest.approx(exact, rel=0.2)
    with pytest.raises(AssertionError, match="hessian: expected"):
        agreement(exact, [1.01 * exact], "hessian")


def test_a_check_leaves_the_model_as_it_was() -> None:
    problem = CASES["tiny 16x16"].build()
    before = {name: value.clone() for name, value in problem.model.state_dict().items()}
    check(problem, chosen(list(CANDIDATES), "tiny 16x16").values(), 2)
    assert same(before, dict(problem.model.state_dict()))
    assert problem.model.training
    assert all(p.requires_grad and p.grad is None for p in problem.model.parameters())


def test_counts_of_a_head() -> None:
    """Many classes: the head takes three products, SAM six, FAM three more, a probe two more."""
    labels = ("plain", "SAM", "FAM exact", "FAM exact, detached", "FAM hutchinson")
    product = 2 * 100 * 16 * 8
    found = counted(head(classes=100, features=16, rows=8), *labels)
    assert found == dict(zip(labels, (n * product for n in (3, 6, 6, 5, 5)), strict=True))


def test_counts_of_a_perceptron() -> None:
    """Gauss-Newton of all layers: a product more for the derivatives at the layers' outputs, and for each of
    the weight's and of the output's derivative of that; with a constant curvature only for the weight's."""
    widths = (6, 5, 7, 3)
    layers: list[torch.nn.Module] = [torch.nn.Linear(a, b, bias=False) for a, b in pairwise(widths)]
    model = torch.nn.Sequential(layers[0], torch.nn.Tanh(), layers[1], torch.nn.Tanh(), layers[2])
    problem = Problem(model, layers, torch.randn(4, 6), torch.randint(0, 3, (4,)))
    found = counted(problem, "plain", "FAM Gauss-Newton", "FAM Gauss-Newton, detached")
    plain, whole, detached = found.values()
    first, others = 2 * 4 * 6 * 5, 2 * 4 * (5 * 7 + 7 * 3)
    assert plain == 2 * first + 3 * others  # nothing below the first layer asks for its input's derivative
    assert detached == plain + 2 * (first + others)
    assert whole == plain + 3 * (first + others)


def test_looksam_takes_the_second_gradient_in_every_tenth_step() -> None:
    found = counted(head(classes=40, features=16, rows=8), "plain", "LookSAM", "SAM")
    assert found["LookSAM"] / found["plain"] == pytest.approx(1.1)
    assert found["SAM"] / found["plain"] == 2


def test_every_block_has_a_whole_period_of_every_candidate() -> None:
    """A candidate with a dear step in three is timed with one in every block of six beside one of two."""
    taken: list[str] = []

    class Logging(Candidate):
        def build(self, problem: Problem) -> measuring.Step:
            return lambda: taken.append(self.about)

    candidates = {"plain": Logging("a", {}, period=2), "other": Logging("b", {}, period=3)}
    steps, _ = measuring.prepared(perceptron(lambda model: model[0], 2, 3, 3), candidates, CPU, counted=False)
    assert taken == ["a"] * 4 + ["b"] * 6  # warm-up and memory: a period each
    taken.clear()
    found = measuring.timings(steps, candidates, 0.0, CPU)
    assert taken[:24] == [*"a" * 6, *"b" * 6, *"a" * 6, *"b" * 6]
    assert found["plain"]["ratio"] == 1 and found["other"]["rounds"] == measuring.LEAST


def test_a_refusal_is_a_cell_of_every_table() -> None:
    plain = {"ratio": 1, "quartiles": [1, 1], "seconds": 0.1, "peak_bytes": 1e6, "memory": 1}
    fam = {"refused": "BatchNorm"}
    rows = [{"task": "a", "candidates": {"plain": plain, "FAM exact": {**plain, "ratio": 1.5}}}]
    rows.append({"task": "b", "candidates": {"plain": plain, "FAM exact": fam}})
    time, memory = tables.tables(rows)
    assert [*time.columns[2].cells] == ["1.50 (1.00-1.00)", "refused"]
    assert [*memory.columns[2].cells] == ["1.00", "refused"]
