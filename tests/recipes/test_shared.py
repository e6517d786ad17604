"""What all recipes share: the timing loop, tables on narrow terminals, and networks with a batch."""

from __future__ import annotations

import io

import pytest
import torch
from rich.console import Console
from torch import nn

from recipes.shared import timing
from recipes.shared.problem import Problem
from recipes.shared.tables import markdown, show, table, titled


def test_calls_take_turns_and_every_round_begins_with_another() -> None:
    log: list[str] = []
    calls = {name: lambda name=name: log.append(name) for name in "abc"}
    found = timing.alternate(calls, 3)
    assert "".join(log) == "abc" + "bca" + "cab" + "abc"  # the first round warms up
    assert {name: len(seconds) for name, seconds in found.items()} == {"a": 3, "b": 3, "c": 3}


def test_ratio_is_taken_within_rounds() -> None:
    """A machine twice as slow in every second round changes no ratio."""
    seconds = {"plain": [1.0, 2.0, 1.0, 2.0], "own": [3.0, 6.0, 3.5, 6.0]}
    found = timing.relative(seconds, "plain")
    assert found["plain"]["ratio"] == 1 and found["own"]["ratio"] == 3
    assert found["own"]["quartiles"] == [3, pytest.approx(3.125)]
    assert found["own"]["seconds"] == 4.75


def test_a_table_that_is_too_wide_is_turned_and_no_number_is_cut() -> None:
    names = [f"quantity {number}" for number in range(8)]
    wide = table("run", *names, rows=[["fam", *(f"{number / 7:.8f}" for number in range(8))]])
    for width, turned in ((200, False), (60, True), (20, True)):
        text = io.StringIO()
        show(Console(file=text, width=width), wide)
        assert "0.14285714" in text.getvalue() and "…" not in text.getvalue()
        assert ("| fam" not in text.getvalue()) == turned


def test_markdown_has_captions() -> None:
    first, second = table("a", rows=[["1"]], title="Numbers"), table("b", rows=[["2"]])
    assert markdown(first, second) == "Numbers:\n\n| a |\n|---|\n| 1 |\n\n| b |\n|---|\n| 2 |\n"
    known = titled(table("c", rows=[["3"]]), "More", "What they mean.")
    assert markdown(known) == "## More\n\nWhat they mean.\n\n| c |\n|---|\n| 3 |\n"


def test_a_copy_of_a_problem_is_apart_and_of_the_precision_asked_for() -> None:
    layer = nn.Linear(3, 2)
    problem = Problem(
        nn.Sequential(nn.Linear(4, 3), nn.Tanh(), layer), layer, torch.randn(5, 4), torch.arange(5) % 2
    )
    twin = problem.copy(torch.float64)
    assert twin.layer is twin.model[2] and twin.weight.dtype == torch.float64  # type: ignore[index]
    torch.testing.assert_close(twin.loss().float(), problem.loss())
    torch.testing.assert_close(problem.loss_of_weight(problem.weight.detach()), problem.loss())
    twin.weight.data.zero_()
    assert problem.weight.abs().sum() > 0


def test_the_gradient_is_one_vector_with_zeros_for_what_is_unused() -> None:
    layer = nn.Linear(3, 2)
    model = nn.Sequential(layer)
    model.register_parameter("unused", nn.Parameter(torch.ones(4)))
    problem = Problem(model, layer, torch.randn(5, 3), torch.arange(5) % 2)
    gradient = problem.gradient(problem.loss())
    assert gradient.shape == (4 + 6 + 2,) and (gradient == 0).sum() == 4
