"""The paper's numbers: that they are the paper's, and that runs stand beside the right ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from rich.table import Table

from recipes import report
from recipes.paper import __main__ as paper
from recipes.paper.comparison import ROWS, Row, compare, figure_4
from recipes.shared.results import save


def row(experiment: str, name: str, part: float = 1) -> Row:
    (found,) = [r for r in ROWS if (r.experiment, r.name, r.part) == (experiment, name, part)]
    return found


def test_the_papers_numbers() -> None:
    """What its text says of its own tables: a slip of a column would break these relations."""
    accuracy = {r.experiment: {} for r in ROWS}  # type: ignore[var-annotated]
    for r in ROWS:
        for value in r.numbers.values():
            accuracy[r.experiment].setdefault(r.name, float(value.split()[0]))
    best = {name: max(lines, key=lines.get) for name, lines in accuracy.items() if name != "skulls"}
    assert best == {
        **{"cifar10": "FAM", "cifar100": "FAM", "svhn": "SAM", "fashion-mnist": "SAM"},
        "rte": "FAM",
    }
    lams = [f"lambda {lam}" for lam in (0.0006, 0.002, 0.02, 0.1, 0.7)]
    for part in (0.5, 1):
        for metric, better in (("dsc", 1), ("hd", -1), ("hd95", -1)):
            for defect in ("same_defect", "other_defect"):
                quantity = f"{defect}_{metric}"
                baseline = float(row("skulls", "baseline", part).numbers[quantity])
                for name in lams:
                    assert better * (float(row("skulls", name, part).numbers[quantity]) - baseline) > 0
    baseline = row("skulls", "baseline").numbers
    assert (baseline["same_defect_dsc"], baseline["other_defect_hd"]) == ("0.6464", "7.1421")
    half = row("skulls", "baseline", 0.5).numbers
    assert (half["same_defect_dsc"], half["other_defect_hd95"]) == ("0.6569", "2.1371")
    for name in lams[2:]:  # "identical to all digits" on both sets
        for part in (0.5, 1):
            numbers = row("skulls", name, part).numbers
            assert all(
                numbers[f"same_defect_{m}"] == numbers[f"other_defect_{m}"] for m in ("dsc", "hd", "hd95")
            )


def run(task: str, history: dict[str, list[Any]], label: str = "sgd", **changes: Any) -> dict[str, Any]:
    """A run of a report's JSON."""
    settings = {"optimizer": label.split("-")[0], "base": "sgd", "lr": 0.03, **changes.pop("settings", {})}
    return {
        **{"task": task, "label": label, "seed": 0, "settings": settings, "history": history},
        **{"epochs": len(next(iter(history.values()))), "batch_size": 64, "layers": ["fc"], **changes},
    }


def cells(table: Table | None) -> list[dict[str, str]]:
    assert table is not None
    names = [str(column.header) for column in table.columns]
    rows = zip(*(column.cells for column in table.columns), strict=True)
    return [dict(zip(names, map(str, values), strict=True)) for values in rows]


def test_what_was_not_run_says_so() -> None:
    found = cells(compare("cifar10", []))
    assert [line["line"] for line in found] == ["baseline", "SAM", "FAM"]
    assert found[2]["test accuracy (%)"] == "95.62 ± 0.002 / not run"
    assert compare("quickstart", []) is None


def test_runs_stand_beside_the_papers_number_with_what_differs() -> None:
    runs = [
        run("cifar10", {"test_accuracy": [80.0, accuracy]}, seed=seed)
        for seed, accuracy in enumerate((90.0, 91.0))
    ]
    fam = {"lam": 0.2, "measure": "neuronwise", "detach_hessian": True}
    runs.append(run("cifar10", {"test_accuracy": [1.0] * 249 + [95.0]}, "fam-lam=0.2", settings=fam))
    baseline, sam, flat = cells(compare("cifar10", runs))
    assert baseline["test accuracy (%)"] == "95.53 ± 0.0001 / 90.5 ± 0.71 (max 91)"
    assert baseline["other than in the paper"] == "epochs 2, not 250; 2 seeds"
    assert sam["run"] == "not run"
    assert flat["test accuracy (%)"] == "95.62 ± 0.002 / 95"
    assert flat["other than in the paper"] == "lam 0.2, not 0.1; Hessian detached; 1 seed"


def test_skulls_have_a_row_per_lambda_and_half_of_the_training() -> None:
    history = {
        "same_defect_dsc": [None, [0.5, 0.7], 0.61, [0.25, 0.75]],
        "same_defect_hd": [None, [3.0], None, [4.0]],
    }
    runs = [
        run("skulls-small", history, "adam", layers=["from_latent"]),
        run("skulls-small", history, "fam-lam=0.02", settings={"lam": 0.02}, layers=["from_latent"]),
        run("skulls-small", history, "fam-lam=0.5", settings={"lam": 0.5}, layers=["from_latent"]),
    ]
    found = {(line["line"], line["after"]): line for line in cells(compare("skulls-small", runs))}
    assert len(found) == 12
    assert found["baseline", "half"]["same defect DSC (0 to 1)"] == "0.6569 / 0.6"
    assert found["baseline", "the end"]["same defect DSC (0 to 1)"] == "0.6464 / 0.5"
    assert found["lambda 0.02", "the end"]["same defect HD (voxels)"] == "6.5221 / 4"
    assert found["lambda 0.02", "the end"]["other defect HD (voxels)"] == "6.5221 / nan"
    assert found["lambda 0.7", "half"]["run"] == "not run"
    assert "20 generated shells" in found["baseline", "half"]["other than in the paper"]
    assert "epochs 4, not 200" in found["baseline", "half"]["other than in the paper"]


def test_lam_0_is_the_baseline() -> None:
    runs = [run("cifar10", {"test_accuracy": [95.0]}, "fam-lam=0", settings={"lam": 0})]
    baseline, _, fam = cells(compare("cifar10", runs))
    assert (baseline["run"], fam["run"]) == ("fam-lam=0", "not run")


@pytest.mark.parametrize(("value", "shown"), [(70.0, "0.7"), (69.314, "0.6931")])
def test_rte_is_compared_as_a_fraction(value: float, shown: str) -> None:
    runs = [run("rte", {"development_accuracy": [value]}, "adam", layers=["bert.classifier"])]
    assert (
        cells(compare("rte", runs))[0]["development accuracy (fraction)"]
        == f"0.67364 ± 0.018 (max 0.6931) / {shown}"
    )


def test_factors_of_figure_4_are_of_the_same_layer() -> None:
    seconds = {
        **{("autograd loop", 4): 0.4, ("vectorised autograd", 4): 0.1, ("torch.func", 4): 0.2},
        **{("autograd loop", 80): 8.0, ("vectorised autograd", 80): 1.0, ("torch.func", 80): 0.5},
        ("torch.func", 128): 2.0,
    }
    runs = [
        {"method": method, "family": "hidden", "d": m, "m": m, "seconds": value}
        for (method, m), value in seconds.items()
    ]
    vectorised, functorch = cells(figure_4(runs))
    assert (vectorised["than"], vectorised["paper (RTX A6000)"]) == ("autograd loop", "up to 1,000")
    assert vectorised["here, range over the sizes"] == "4 to 8"
    assert functorch["here, range over the sizes"] == "0.5 to 2"
    assert functorch["here, largest Hessian"] == "2 (80 x 80 weights)"


def test_every_report_of_an_experiment_has_the_papers_numbers(tmp_path: Path) -> None:
    """A second table behind the runs' own, in the Markdown too; none for a smoke test or another task."""
    for task, smoke, wanted in (
        ("cifar10", False, True),
        ("cifar10", True, False),
        ("quickstart", False, False),
    ):
        runs = [run(task, {"epoch": [1], "test_accuracy": [95.0], "kappa": [1.0]}, smoke=smoke)]
        runs[0]["step_time"] = {"median": 1.0}
        save(tmp_path / "report.json", {"recipe": "train", "runs": runs})
        report.main([str(tmp_path / "report.json")])
        text = (tmp_path / "report.md").read_text()
        assert "| sgd" in text
        assert ("95.62 ± 0.002 / not run" in text) == ("95.53 ± 0.0001 / 95" in text) == wanted


def test_the_papers_tables_are_those_of_the_saved_results(tmp_path: Path) -> None:
    """Settings, every experiment's numbers, Figure 4: what `python -m recipes.paper` writes."""
    paper.main(["--out", str(tmp_path / "paper.md")])
    text = (tmp_path / "paper.md").read_text()
    assert len(text.splitlines()) > 60
    assert (paper.RESULTS / "paper.md").read_text() == text
