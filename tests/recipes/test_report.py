"""Reports: tables from the JSON alone, one per task, and pictures in which everything can be told apart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from recipes import report, train
from recipes.engine.pictures import plot_boxes, plot_curves
from recipes.shared.pictures import SERIES, looks
from recipes.shared.results import load

RESULTS = Path(report.__file__).parent / "results"
SAVED = sorted(path for path in RESULTS.glob("*.json") if json.loads(path.read_text())["recipe"] == "train")


def smoke(path: Path, task: str, *arguments: str) -> None:
    train.main([task, *arguments, "--smoke", "--device", "cpu", "--out", str(path)])


def test_report_of_several_optimizers_and_seeds(tmp_path: Path) -> None:
    arguments = ("--seeds", "0", "1", "--epochs", "2")
    smoke(tmp_path, "quickstart", *arguments, "--optimizer", "sgd")
    smoke(tmp_path, "quickstart", *arguments, "--optimizer", "fam", "--lam", "0.001", "0.01")
    report.main([str(tmp_path), "--out", str(tmp_path / "report")])
    results = json.loads((tmp_path / "report.json").read_text())
    assert [(run["label"], run["seed"]) for run in results["runs"]] == [
        (label, seed) for label in ("sgd", "fam-lam=0.001", "fam-lam=0.01") for seed in (0, 1)
    ]
    first = (tmp_path / "report.md").read_text()
    mean = sum(run["history"]["test_accuracy"][-1] for run in results["runs"][:2]) / 2
    assert f"| {mean:.4g} ±" in first
    (tmp_path / "report.md").unlink()
    report.main([str(tmp_path / "report.json")])  # from the JSON alone
    assert (tmp_path / "report.md").read_text() == first


@pytest.mark.parametrize("path", SAVED, ids=lambda path: path.stem)
def test_the_committed_tables_are_those_of_the_committed_results(path: Path) -> None:
    tables = report.markdown(*report.tables(load(path)["runs"]))
    assert path.with_suffix(".md").read_text() == tables


def test_several_tasks_have_a_table_each(tmp_path: Path) -> None:
    smoke(tmp_path, "quickstart")  # with a validation set
    smoke(tmp_path, "fashion-mnist-small")  # without
    report.main([str(tmp_path)])
    text = (tmp_path / "report.md").read_text()
    heads = [line for line in text.splitlines() if line.startswith("| optimizer")]
    assert len(heads) == 2 and "validation" not in heads[0] and "validation" in heads[1]
    assert "fashion-mnist-small, a smoke test" in text and "nan" not in text


def test_a_run_that_diverged_is_reported_beside_one_that_did_not(tmp_path: Path) -> None:
    smoke(tmp_path, "quickstart", "--seeds", "0", "1", "--epochs", "2", "--optimizer", "sgd")
    path = tmp_path / "smoke" / "quickstart" / "sgd" / "seed1" / "epochs.jsonl"
    first, last = map(json.loads, path.read_text().splitlines())
    first |= {"validation_accuracy": None, "test_accuracy": 0.0}  # null: not finite
    last |= dict.fromkeys(("test_nll", "kappa"))
    path.write_text(f"{json.dumps(first)}\n{json.dumps(last)}\n")
    report.main([str(tmp_path), "--out", str(tmp_path / "report")])
    row = (tmp_path / "report.md").read_text().splitlines()[-1]
    _, name, _, _, _, test, nll, kappa, best, _, _ = (cell.strip() for cell in row.split("|"))
    assert name == "sgd" and (nll, kappa) == ("nan", "nan")
    assert best == test and "±" in test  # the last epoch, not the one without a validation accuracy


@pytest.mark.parametrize("source", ["README.md", "none.json", "empty", "other.json"])
def test_a_report_of_something_else_is_one_sentence(source: str, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("# Recipes\n")
    (tmp_path / "empty").mkdir()
    (tmp_path / "other.json").write_text('{"recipe": "scaling", "runs": [{}]}')
    with pytest.raises(SystemExit, match=rf"report: .*{source}"):
        report.main([str(tmp_path / source)])


def made_up(label: str, epochs: int, seed: int = 0, **history: Any) -> dict[str, Any]:
    rising = {"train_loss": 1 / np.arange(1, epochs + 1), "kappa": np.arange(1.0, epochs + 1)}
    measured = {name: values.tolist() for name, values in rising.items()} | history
    return {
        "task": "t",
        "label": label,
        "seed": seed,
        "history": {"epoch": list(range(1, epochs + 1)), **measured},
    }


def test_every_optimizer_and_every_value_of_a_sweep_has_its_colour_and_a_method_the_same_everywhere() -> None:
    few = ["sgd", "sam", "asam", "fam", "fam-proximal", "sgd-lr=0.1", "fam-lam=0.2"]
    many = [f"fam-lam={number}" for number in range(SERIES)]
    for labels in (few, many):
        chosen = looks(labels)
        assert list(chosen) == labels and len({look["color"] for look in chosen.values()}) == len(labels)
    for names in (("sam", "SAM"), ("fam-proximal", "FAM proximal"), ("plain", "SGD")):
        assert len({tuple(looks([name])[name].values()) for name in names}) == 1


def test_a_picture_has_at_most_eight_series_and_they_are_the_best() -> None:
    runs = [made_up(f"fam-lam={n}", 2, test_accuracy=[50.0, 50.0 + n]) for n in range(SERIES + 3)]
    axis = plot_curves(runs).axes[0]
    assert {line.get_label() for line in axis.lines} == {f"fam-lam={n}" for n in range(3, SERIES + 3)}


def test_a_run_that_failed_does_not_hide_the_others() -> None:
    runs = [made_up(f"fam-lam={n}", 4, test_accuracy=[50.0, 70.0, 80.0, 80.0 + n]) for n in range(6)]
    runs.append(made_up("fam-lam=9", 4, test_accuracy=[10.0] * 4))
    low, high = plot_curves(runs).axes[0].get_ylim()
    assert 50 < low < 80 and 85 <= high < 100


def test_one_epoch_is_seen() -> None:
    runs = [made_up("sgd", 1, test_accuracy=[50.0]), made_up("fam", 1, test_accuracy=[51.0])]
    for axis in plot_curves(runs).axes:
        points = [line for line in axis.lines if line.get_marker() and len(line.get_xdata()) == 1]
        assert len(points) == 2


def test_curves_show_what_was_measured_now_and_then() -> None:
    """The Dice coefficient at two epochs of four, one value per skull; every axis has its unit."""
    dice = [None, [0.5, 0.7], None, [0.7, 0.9]]
    figure = plot_curves([made_up("adam", 4, test_dsc=dice)])
    (axis,) = (axis for axis in figure.axes if axis.get_ylabel().startswith("test DSC"))
    (line,) = axis.lines
    assert line.get_xdata().tolist() == [2, 4] and line.get_ydata().tolist() == pytest.approx([0.6, 0.8])
    shown = [axis for axis in figure.axes if axis.axison]
    assert all("(" in axis.get_ylabel() and "(" in axis.get_xlabel() for axis in shown)


def test_no_legend_is_cut_off_and_no_picture_is_wider_than_a_page() -> None:
    labels = ["adam", *(f"fam-lam={lam}-detach_hessian" for lam in (0.0006, 0.002, 0.02, 0.1, 0.7))]
    history = {"test_dsc": [[0.5]] * 3, "other_dsc": [[0.6]] * 3, "test_hd95": [[3.0]] * 3}
    runs = [made_up(label, 3, **history) for label in labels]
    for figure in (plot_curves(runs), plot_boxes(runs)):
        assert figure is not None
        figure.canvas.draw()
        box = figure.get_tightbbox()
        assert box.x0 >= 0 and box.y0 >= 0
        assert box.x1 <= figure.get_figwidth() and box.y1 <= figure.get_figheight()
        assert figure.get_figwidth() <= 9.5
