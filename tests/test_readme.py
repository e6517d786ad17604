"""Every Python block of the README runs as it stands, in order, in one namespace."""

from __future__ import annotations

import re
import shutil
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from recipes.benchmark import __main__ as benchmark
from recipes.benchmark import counts, estimators, scaling
from recipes.shared.results import load, markdown
from recipes.study import __main__ as study
from recipes.tasks import TASKS

README = Path(__file__).parent.parent / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)


class ReadersNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 8), nn.ReLU())
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def readers_names() -> dict[str, Any]:
    """What a reader has at hand: a model with a head, a criterion, a batch and a loader."""
    torch.manual_seed(0)
    x, y = torch.randn(12, 6), torch.randint(0, 3, (12,))
    model = ReadersNet()
    return {
        "model": model,
        "criterion": nn.CrossEntropyLoss(),
        "x": x,
        "y": y,
        "loader": DataLoader(TensorDataset(x, y), batch_size=4),
        "__name__": "readme",
    }


def test_python_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = readers_names()
    before = names["model"].head.weight.detach().clone()
    assert len(BLOCKS) > 1
    for number, block in enumerate(BLOCKS, 1):
        exec(compile(block, f"README.md, Python block {number}", "exec"), names)
    assert not torch.equal(names["model"].head.weight, before)


def test_the_three_line_diff() -> None:
    (diff,) = re.findall(r"```diff\n(.*?)```", README.read_text(), flags=re.DOTALL)
    names = readers_names()
    for sign in "-+":
        lines = [line[1:] for line in diff.splitlines() if line[0] in (sign, " ")]
        exec("from fam_optim import FAM\nimport torch\n" + "\n".join(lines), names)
        assert type(names["optimizer"]).__name__ == {"-": "SGD", "+": "FAM"}[sign]
    assert names["loss"].isfinite()


def test_every_test_that_is_named_exists() -> None:
    named = re.findall(r"`(test_\w+)::(test_\w+)`", README.read_text())
    assert len(named) > 10
    for module, test in named:
        assert callable(getattr(import_module(f"tests.{module}"), test))


RECIPES = README.parent / "recipes"
PAGES = [
    README,
    *(RECIPES / name for name in ("README.md", "benchmark/README.md", "paper/README.md", "study/README.md")),
    RECIPES / "study" / "LAST_LAYER.md",
]


@pytest.mark.parametrize("readme", PAGES, ids=lambda page: str(page.relative_to(README.parent)))
def test_every_recipe_and_link_that_is_named_exists(readme: Path) -> None:
    text = readme.read_text()
    for name in re.findall(r"python -m recipes\.([\w.]*\w)", text):
        module = import_module(f"recipes.{name}")
        assert callable(
            (import_module(f"recipes.{name}.__main__") if hasattr(module, "__path__") else module).main
        )
    for task in re.findall(r"recipes\.train ([\w-]+)", text) + re.findall(r"`train ([\w-]+)", text):
        assert task in TASKS
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert (readme.parent / link).exists(), link


def saved(name: str) -> Any:
    return load(RECIPES / "results" / f"{name}.json")["runs"]


def test_the_benchmarks_tables_are_those_of_the_saved_results() -> None:
    measured = saved("benchmark")
    tables = [
        *benchmark.tables(measured),
        *counts.tables(saved("benchmark_counts"), measured),
        scaling.table(saved("scaling")),
        estimators.table(saved("estimator_spread")),
    ]
    lines = markdown(*tables).splitlines()
    assert len(lines) > 60
    page = (RECIPES / "benchmark" / "README.md").read_text().splitlines()
    assert [line for line in lines if line not in page] == []


def test_the_studys_tables_are_those_of_the_saved_results(tmp_path: Path) -> None:
    results = RECIPES / "results" / "study"
    for path in results.glob("*.json*"):
        shutil.copy(path, tmp_path)
    study.main(["--report", str(tmp_path)])
    tables = (results / "tables.md").read_text()
    assert (tmp_path / "tables.md").read_text() == tables
    assert_taken_from(RECIPES / "study" / "README.md", tables)


def test_the_earlier_studys_tables_are_those_that_were_saved() -> None:
    saved_tables = (RECIPES / "results" / "study" / "last_layer" / "tables.md").read_text()
    assert_taken_from(RECIPES / "study" / "LAST_LAYER.md", saved_tables)


def assert_taken_from(page: Path, tables: str) -> None:
    """Every line of the page's tables is one of the tables', and there are some."""
    lines = [line for line in page.read_text().splitlines() if line.startswith("|")]
    assert len(lines) > 20
    assert [line for line in lines if line not in tables.splitlines()] == []


def test_ci_runs_the_readmes_test_command() -> None:
    script = (README.parent / ".ci" / "run").read_text()
    assert "README.md" in script and "python -m pytest" in README.read_text()


def test_changelog_and_version_are_there() -> None:
    import fam_optim

    changelog = (README.parent / "CHANGELOG.md").read_text()
    assert "## [Unreleased]" in changelog or f"## [{fam_optim.__version__}]" in changelog
