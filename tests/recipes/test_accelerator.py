"""``python -m recipes.benchmark --accelerator``, as far as a CPU goes: tiny networks, and what waits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from recipes.benchmark import __main__ as benchmark
from recipes.benchmark import accelerator, tables


@pytest.mark.slow
def test_every_precision_and_way_of_two_networks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    benchmark.main(["--accelerator", "--smoke", "--device", "cpu", "--out", str(tmp_path)])
    rows = json.loads((tmp_path / "smoke" / "accelerator.json").read_text())["runs"]
    two = accelerator.SMOKE
    assert [row["task"] for row in rows] == [f"{name}, {p}" for p in accelerator.RESERVE for name in two]
    for row in rows:
        compiled = "compiled" in row["task"]
        assert [*row["candidates"]] == [*(accelerator.COMPILED if compiled else accelerator.COLUMNS)]
        assert all(result["ratio"] > 0 and result["waits"] == "" for result in row["candidates"].values())
        assert ("check" in row) == ("float32" in row["task"])
    assert "a, float32: measured" in capsys.readouterr().out
    torch.compiler.reset()


def test_what_takes_longer_than_there_is_time_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accelerator, "LIMIT", 1.0)
    rows = [*accelerator.measure(torch.device("cpu"))]
    assert len(rows) == len(accelerator.NETWORKS) * len(accelerator.RESERVE)
    assert all(row["left out"] and not row["candidates"] for row in rows)
    assert tables.tables(rows) == []


def test_a_step_that_waits_is_named() -> None:
    def waiting() -> None:
        raise RuntimeError("called a synchronizing CUDA operation")

    def failing() -> None:
        raise RuntimeError("anything else")

    cpu = torch.device("cpu")
    assert accelerator.what_waits(lambda: None, cpu) == ""
    reason = accelerator.what_waits(waiting, cpu)
    assert "synchronizing" in reason
    with pytest.raises(RuntimeError, match="anything else"):
        accelerator.what_waits(failing, cpu)
    row = {
        "task": "BERT",
        "candidates": {"plain": {"waits": ""}, "FAM exact": {"waits": reason}, "SAM": {"waits": reason}},
    }
    assert accelerator.verdict([row]) == "BERT: expected no step to wait for the device, but FAM exact does."
    row["candidates"]["plain"]["waits"] = reason
    assert accelerator.verdict([row]) == ""


def test_a_wrong_number_is_named_and_right_ones_are_not() -> None:
    row = {"task": "BERT", "candidates": {}, "check": {"device": 1.0, "cpu": 1.0005}}
    assert accelerator.verdict([row]) == ""
    for wrong in (1.1, float("nan")):
        row["check"] = {"device": wrong, "cpu": 1.0}
        assert accelerator.verdict([row]) == f"BERT: expected the CPU's kappa 1.0, got {wrong}."


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    with pytest.raises(SystemExit, match="expects a GPU"):
        benchmark.main(["--accelerator"])
