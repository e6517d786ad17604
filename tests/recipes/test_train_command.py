"""What a user types at recipes.train and its neighbours: wrong words are one sentence, and leave nothing."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from recipes import flatness, quickstart, report, train
from recipes.benchmark import __main__ as benchmark
from recipes.benchmark.candidates import CANDIDATES
from recipes.benchmark.cases import CASES
from recipes.engine import progress
from recipes.engine.run_folder import RunFolder
from recipes.study import __main__ as study
from recipes.tasks import TASKS, small

FOLDER = Path("quickstart", "fam", "seed0")


@pytest.fixture(autouse=True)
def few_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Real runs, on as many images as a smoke test has."""
    monkeypatch.setattr(small.quickstart, "__defaults__", (0.0, 256))


def run(path: Path, *arguments: str) -> None:
    train.main(["quickstart", *arguments, "--device", "cpu", "--out", str(path)])


def smoke(path: Path, *arguments: str) -> None:
    run(path, *arguments, "--smoke")


MISUSE = {
    "other settings": (["--resume", "--epochs", "7"], "begun with another.*epochs: 1 there, 7"),
    "an option that nobody takes": (["--rho", "0.1"], r"--rho: none of.*\(fam\) takes it"),
}


@pytest.mark.parametrize(("arguments", "message"), MISUSE.values(), ids=MISUSE)
def test_misuse_is_one_sentence(arguments: list[str], message: str, tmp_path: Path) -> None:
    smoke(tmp_path)
    with pytest.raises(SystemExit, match=message):
        smoke(tmp_path, *arguments)


TOO_LARGE = "expected a batch size of at most the 256 training samples, got 100000"
BOTH = {  # of what a user types at recipes.train and at recipes.quickstart
    "a seed twice": (["--seeds", "0", "0"], "--seeds: expected every value once, got 0 0"),
    "no epoch": (["--epochs", "0"], "--epochs: expected a whole number from 1 on, got '0'"),
    "fewer than none": (["--epochs", "-3"], "--epochs: expected a whole number from 1 on, got '-3'"),
    "no device": (["--device", "foo"], "--device: expected a device such as cpu.*, got 'foo'"),
}
if not torch.cuda.is_available():
    BOTH["no GPU"] = (["--device", "cuda"], "expected a device such as cpu .torch sees no GPU., got 'cuda'")
REFUSED = {
    train.main: BOTH
    | {
        "no learning rate": (["--lr", "nan"], "--lr: expected a finite number, got 'nan'"),
        "no number": (["--lam", "a"], "--lam: expected a finite number, got 'a'"),
        "a value twice": (["--lam", "0.1", "0.1"], "--lam: expected every value once, got 0.1 0.1"),
        "an empty batch": (["--batch-size", "0"], "--batch-size: expected a whole number from 1 on, got '0'"),
        "no probe": (["--n-samples", "0"], "--n-samples: expected a whole number from 1 on"),
    },
    quickstart.main: BOTH
    | {
        "per cent": (["--noise", "40"], "--noise: expected a fraction from 0 to 1, such as 0.4, got '40'"),
        "a level twice": (["--noise", "0", "0"], "--noise: expected every value once, got 0.0 0.0"),
        "more than there are": (["--train-size", "3001"], "expected from 64 to 3000 images, got 3001"),
        "less than a batch": (["--train-size", "5"], "expected from 64 to 3000 images, got 5"),
    },
}


@pytest.mark.parametrize(
    ("command", "name"),
    [(command, name) for command, cases in REFUSED.items() for name in cases],
    ids=lambda value: value if isinstance(value, str) else value.__module__,
)
def test_an_impossible_argument_is_refused(
    command: Any, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, message = REFUSED[command][name]
    task = ["quickstart"] if command is train.main else []
    with pytest.raises(SystemExit):
        command([*task, *arguments, "--out", str(tmp_path)])
    error = capsys.readouterr().err
    assert re.search(message, error.splitlines()[-1]), error
    assert not list(tmp_path.iterdir())


def test_a_refused_setting_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"quickstart: .*lam"):
        run(tmp_path, "--epochs", "1", "--lam", "-1")
    assert not list(tmp_path.rglob("config.json"))
    with pytest.raises(SystemExit, match="learning rate"):
        run(tmp_path, "--epochs", "1", "--lr", "-1", "--optimizer", "sgd")
    assert not list(tmp_path.rglob("config.json"))


def test_a_smoke_test_is_out_of_the_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It may be repeated, does not block the real run, and stays out of a report."""
    for _ in range(2):
        smoke(tmp_path)
    run(tmp_path, "--epochs", "2")
    assert len(RunFolder(tmp_path / "smoke" / FOLDER).epochs()) == 1
    assert len(RunFolder(tmp_path / FOLDER).epochs()) == 2
    report.main([str(tmp_path)])
    runs = json.loads((tmp_path / "report.json").read_text())["runs"]
    assert [run["smoke"] for run in runs] == [False]
    with pytest.raises(SystemExit, match=r"holds a run already.*--resume"):
        run(tmp_path, "--epochs", "2")


def test_a_batch_larger_than_the_data_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=f"quickstart: {TOO_LARGE}"):
        run(tmp_path, "--batch-size", "100000")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", [train.main, benchmark.main])
def test_help_says_what_every_task_is(command: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command(["--help"])
    printed = capsys.readouterr().out
    for name, entry in (TASKS if command is train.main else CASES).items():
        assert name in printed and entry.about in printed
    if command is benchmark.main:
        assert all(label in printed and candidate.about in printed for label, candidate in CANDIDATES.items())


def test_flatness_of_every_layer_of_two_runs_and_over_training(tmp_path: Path) -> None:
    smoke(tmp_path, "--optimizer", "sgd", "fam", "--epochs", "4", "--keep", "2")
    folders = [str(tmp_path / "smoke" / "quickstart" / name / "seed0") for name in ("sgd", "fam")]
    flatness.main([*folders, "--out", str(tmp_path / "flat")])
    rows = json.loads((tmp_path / "flat" / "flatness.json").read_text())["runs"]
    layers = ["features.0", "features.4", "features.9", "head"]
    assert [(row["label"], row["epoch"], row["layer"]) for row in rows] == [
        (label, epoch, layer) for label in ("sgd", "fam") for epoch in (2, 4) for layer in layers
    ]
    assert all(row["kappa"] > 0 for row in rows)
    (record,) = (record for record in RunFolder(Path(folders[0])).epochs() if record["epoch"] == 4)
    (head,) = (row for row in rows if (row["label"], row["epoch"], row["layer"]) == ("sgd", 4, "head"))
    assert head["kappa"] == pytest.approx(record["kappa"], rel=0.5)  # an estimate beside the exact number
    for name, message in ((tmp_path / "nothing", "expected a run's folder"), (None, "the folder of one run")):
        with pytest.raises(SystemExit, match=message):
            flatness.main([*([str(name)] if name else []), "--out", str(tmp_path / "flat")])


def test_a_pipe_gets_one_line_per_epoch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    smoke(tmp_path, "--epochs", "3")
    lines = [line for line in capsys.readouterr().out.splitlines() if "epoch" in line]
    assert [line.split("epoch ")[1][:3] for line in lines] == ["1/3", "2/3", "3/3"]
    assert all("loss" in line and "test accuracy" in line and "left" in line for line in lines)
    assert lines[-1].endswith("0:00:00 left")


def test_a_long_epoch_is_heard_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "PATIENCE", 0.0)
    smoke(tmp_path)
    lines = [line for line in capsys.readouterr().out.splitlines() if "epoch " in line]
    assert len(lines) >= 2 and "epoch 0/1" in lines[0] and "epoch 1/1" in lines[-1]


def test_stopping_by_hand_names_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "train", interrupted)
    with pytest.raises(SystemExit, match="--resume goes on"):
        smoke(tmp_path)


@pytest.mark.slow
def test_the_study_smokes_on_a_fresh_folder(tmp_path: Path) -> None:
    study.main(["--smoke", "--out", str(tmp_path)])
    assert not list(tmp_path.iterdir())  # nothing that a real run would meet
