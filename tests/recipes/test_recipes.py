"""Every recipe runs its real code path in seconds and writes what it promises."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from recipes import flatness, quickstart, train
from recipes.benchmark import __main__ as benchmark
from recipes.benchmark import counts, estimators, scaling
from recipes.engine.loop import Loop
from recipes.engine.optimizers import OPTIMIZERS
from recipes.engine.run_folder import RunFolder
from recipes.paper import flatness_picture, hessian_time, reparametrisation, trace_time
from recipes.study import conditions
from recipes.tasks import TASKS

PICTURES = {  # these write a JSON file and a picture of their name
    "estimators": estimators.main,
    "flatness": flatness.main,
    "flatness_picture": flatness_picture.main,
    "hessian_time": hessian_time.main,
    "reparametrisation": reparametrisation.main,
    "scaling": scaling.main,
    "trace_time": trace_time.main,
}
RECIPES: dict[str, tuple[Callable[[list[str]], None], list[str]]] = {
    **{name: (main, [f"{name}.json", f"{name}.png"]) for name, main in PICTURES.items()},
    "benchmark": (benchmark.main, ["benchmark.json", "benchmark.md"]),
    "counts": (counts.main, ["counts.json"]),
    "quickstart": (quickstart.main, ["quickstart.json", "quickstart.md", "quickstart-curves.png"]),
}


@pytest.mark.parametrize("name", RECIPES)
def test_smoke(name: str, tmp_path: Path) -> None:
    main, files = RECIPES[name]
    main(["--smoke", "--out", str(tmp_path)])
    assert [p.name for p in tmp_path.iterdir()] == ["smoke"]  # nothing that a real run would meet
    assert sorted(p.name for p in (tmp_path / "smoke").iterdir() if p.is_file()) == sorted(files)
    results = json.loads((tmp_path / "smoke" / files[0]).read_text())
    assert results["runs"] and results["environment"]["torch"]


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_of_nothing_is_one_sentence(name: str, tmp_path: Path) -> None:
    for source, message in (("none.json", "no such file"), ("README.md", "something else")):
        (tmp_path / "README.md").write_text("# Recipes\n")
        with pytest.raises(SystemExit, match=rf"{name}: .*{source}: expected the JSON .* {message}"):
            PICTURES[name](["--plot", str(tmp_path / source)])


class Stopped(Exception):
    """Stands for a power cut."""


def run(path: Path, *arguments: str) -> None:
    train.main([*arguments, "--smoke", "--device", "cpu", "--out", str(path)])


def stop_in_epoch(monkeypatch: pytest.MonkeyPatch, epoch: int) -> None:
    """Fail at the first step of an epoch."""
    batches = Loop.batches

    def failing(loop: Loop, number: int) -> object:
        if number == epoch:
            raise Stopped
        return batches(loop, number)

    monkeypatch.setattr(Loop, "batches", failing)


def same(a: object, b: object) -> bool:
    """Equality of nested containers of tensors, bit for bit."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


TRIED = {*TASKS} - {*conditions.TASKS} | {"diabetes", "reviews"}  # the study has tests of its own


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("task", ["quickstart-noise40"])
def test_a_stopped_run_continues_bit_for_bit(
    task: str, optimizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_resume(task, optimizer, tmp_path, monkeypatch)


@pytest.mark.parametrize("task", sorted(TRIED))
def test_every_task_trains_stops_and_continues(
    task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_resume(task, "fam", tmp_path, monkeypatch)


def check_resume(task: str, optimizer: str, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = (task, "--optimizer", optimizer, "--epochs", "3", "--seeds", "5")
    run(path / "whole", *arguments)
    with monkeypatch.context() as context:
        stop_in_epoch(context, 3)
        with pytest.raises(Stopped):
            run(path / "parts", *arguments)
    run(path / "parts", *arguments, "--resume")
    folders = [RunFolder(path / part / "smoke" / task / optimizer / "seed5") for part in ("whole", "parts")]
    assert len(folders[0].epochs()) == 3
    assert folders[0].epochs() == folders[1].epochs()
    states = [folder.load(torch.device("cpu")) for folder in folders]
    assert states[0] and same(states[0], states[1])
    assert not same(states[0]["model"], {name: 2 * value for name, value in states[0]["model"].items()})


def test_flatness_picture_lies_on_the_parabola(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flatness_picture, "STRENGTHS", flatness_picture.STRENGTHS[:3])
    run(tmp_path, "quickstart", "--optimizer", "sgd", "fam")
    folders = [str(tmp_path / "smoke" / "quickstart" / label / "seed0") for label in ("sgd", "fam")]
    flatness_picture.main([*folders, "--out", str(tmp_path), "--draws", "2"])
    assert (tmp_path / "flatness_picture.png").exists()
    results = json.loads((tmp_path / "flatness_picture.json").read_text())
    strengths = results["configuration"]["strengths"]
    for curve in results["runs"]:
        extra, predicted = curve["extra_loss"][-1], strengths[-1] ** 2 / 2 * curve["kappa"]
        assert abs(extra - predicted) < 10 * curve["standard_error"][-1] + 0.01 * predicted
