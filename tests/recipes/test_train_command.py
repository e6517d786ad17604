"""What a user types at recipes.train and its neighbours: wrong words are one sentence, and leave nothing."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from recipes import quickstart, report, train
from recipes.engine.run_folder import RunFolder
from recipes.study import __main__ as study
from recipes.tasks import small

FOLDER = Path("quickstart", "fam", "seed0")


@pytest.fixture(autouse=True)
def few_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Real runs, on as many images as a smoke test has."""
    monkeypatch.setattr(small.quickstart, "__defaults__", (256,))


def run(path: Path, *arguments: str) -> None:
    train.main(["quickstart", *arguments, "--device", "cpu", "--out", str(path)])


def smoke(path: Path, *arguments: str) -> None:
    run(path, *arguments, "--smoke")


MISUSE = {
    "other settings": (["--resume", "--epochs", "7"], "begun with another.*epochs: 1 there, 7"),
    "an option that nobody takes": (["--rho", "0.1"], r"--rho: none of.*\(fam\) takes it"),
    "nothing to measure": (["--measure-only", "--seeds", "3"], "no checkpoint: train first"),
}


@pytest.mark.parametrize(("arguments", "message"), MISUSE.values(), ids=MISUSE)
def test_misuse_is_one_sentence(arguments: list[str], message: str, tmp_path: Path) -> None:
    smoke(tmp_path)
    with pytest.raises(SystemExit, match=message):
        smoke(tmp_path, *arguments)


REFUSED = {
    "no epoch": (["--epochs", "0"], "--epochs: expected a whole number from 1 on, got '0'"),
    "fewer than none": (["--epochs", "-3"], "--epochs: expected a whole number from 1 on, got '-3'"),
    "an empty batch": (["--batch-size", "0"], "--batch-size: expected a whole number from 1 on, got '0'"),
    "no probe": (["--n-samples", "0"], "--n-samples: expected a whole number from 1 on"),
    "no device": (["--device", "foo"], "--device: expected a device such as cpu.*, got 'foo'"),
}
if not torch.cuda.is_available():
    REFUSED["no GPU"] = (
        ["--device", "cuda"],
        "expected a device such as cpu .torch sees no GPU., got 'cuda'",
    )


@pytest.mark.parametrize(("arguments", "message"), REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("command", [train.main, quickstart.main])
def test_an_impossible_argument_is_refused(
    arguments: list[str], message: str, command: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if command is quickstart.main and arguments[0] in ("--batch-size", "--n-samples"):
        pytest.skip("the quick start has no such option")
    task = ["quickstart"] if command is train.main else []
    with pytest.raises(SystemExit):
        command([*task, *arguments, "--out", str(tmp_path)])  # type: ignore[operator]
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


def test_what_is_asked_for_twice_is_run_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    smoke(tmp_path, "--seeds", "0", "0", "--lam", "0.1", "0.1", "--optimizer", "fam", "fam")
    assert len(list(tmp_path.rglob("config.json"))) == 1
    assert "stopped" not in capsys.readouterr().out


def test_measure_only_prints_whole_numbers_and_keeps_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    smoke(tmp_path, "--seeds", "0", "1")
    capsys.readouterr()
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("FORCE_COLOR", "1")  # a terminal of 80 columns
    smoke(tmp_path, "--seeds", "0", "1", "--measure-only", "--float64")
    output = capsys.readouterr().out
    folder = tmp_path / "smoke" / "quickstart"
    saved = json.loads((folder / "measured.json").read_text())
    assert [run["seed"] for run in saved["runs"]] == [0, 1]
    for run in saved["runs"]:
        (record,) = RunFolder(folder / "fam" / f"seed{run['seed']}").epochs()
        assert run["neuronwise"] == pytest.approx(record["kappa"], rel=1e-3)
        shown = f"{run['neuronwise']:.4g}"
        assert shown[:5] in output and shown[:5] in (folder / "measured.md").read_text()
    assert "…" not in output


def test_a_pipe_gets_one_line_per_epoch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    smoke(tmp_path, "--epochs", "3")
    lines = [line for line in capsys.readouterr().out.splitlines() if "epoch" in line]
    assert [line.split("epoch ")[1][:3] for line in lines] == ["1/3", "2/3", "3/3"]
    assert all("loss" in line and "test accuracy" in line and "left" in line for line in lines)
    assert lines[-1].endswith("0:00:00 left")


def test_a_terminal_of_80_columns_shows_bar_percentage_and_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    smoke(tmp_path, "--lam", "0.0006", "--detach-hessian", "--epochs", "2")
    output = capsys.readouterr().out
    assert "100%" in output and "0:00:00" in output and "━" in output
    assert "test accuracy" in output and "kappa" in output and "…" not in output


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
