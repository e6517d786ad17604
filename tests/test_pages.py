"""Every page keeps its word: its code runs, what it names exists, its numbers are the saved results'."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import shutil
import warnings
from configparser import ConfigParser
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from recipes import report
from recipes.benchmark import estimators, scaling
from recipes.benchmark import tables as benchmark_tables
from recipes.paper import __main__ as paper
from recipes.shared.results import load
from recipes.shared.tables import markdown
from recipes.study import __main__ as study
from recipes.tasks import TASKS

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "recipes" / "results"
PAGES = [
    ROOT / "README.md",
    ROOT / "CHANGELOG.md",
    *(page for folder in ("fam_optim", "recipes", "tests") for page in sorted((ROOT / folder).rglob("*.md"))),
]
PAGES = [page for page in PAGES if RESULTS not in page.parents]  # written by programs, not by hand
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), flags=re.DOTALL | re.MULTILINE)


# Code


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
    return {
        "model": ReadersNet(),
        "criterion": nn.CrossEntropyLoss(),
        "x": x,
        "y": y,
        "loader": DataLoader(TensorDataset(x, y), batch_size=4),
        "__name__": "page",
    }


@every_page
def test_blocks_are_of_a_kind_that_is_checked(page: Path) -> None:
    fences = re.findall(r"^```(\w*)$", page.read_text(), flags=re.MULTILINE)
    assert fences[1::2] == [""] * (len(fences) // 2)
    assert set(fences[::2]) <= {"python", "bash", "diff", "bibtex"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", [p for p in PAGES if blocks(p, "python")], ids=lambda page: str(page.relative_to(ROOT))
)
def test_python_blocks_run_in_order_in_one_namespace(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names = readers_names()
    before = names["model"].head.weight.detach().clone()
    shown = blocks(page, "python")
    for number, block in enumerate(shown, 1):
        exec(compile(block, f"{page.name}, Python block {number}", "exec"), names)
    trains = any("model" in block for block in shown)
    assert trains != torch.equal(names["model"].head.weight, before)


def test_pages_have_code() -> None:
    assert len(blocks(ROOT / "README.md", "python")) == 3
    assert len(blocks(ROOT / "fam_optim" / "README.md", "python")) > 10


@pytest.mark.parametrize(
    "page", [p for p in PAGES if blocks(p, "diff")], ids=lambda page: str(page.relative_to(ROOT))
)
def test_both_sides_of_a_diff_run(page: Path) -> None:
    for diff in blocks(page, "diff"):
        names = readers_names()
        for sign in "-+":
            lines = [line[1:] for line in diff.splitlines() if line[0] in (sign, " ")]
            exec("from fam_optim import FAM, weight_layers\nimport torch\n" + "\n".join(lines), names)
            assert type(names["optimizer"]).__name__ == {"-": "SGD", "+": "FAM"}[sign]
        assert names["loss"].isfinite()


def commands(page: Path) -> list[list[str]]:
    """What the shell blocks run, each command in words."""
    lines = "\n".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
    found = [shlex.split(part, comments=True) for line in lines for part in line.split("&&")]
    return [[word for word in words if not re.fullmatch(r"[A-Z_]+=\S+", word)] for words in found if words]


@cache
def options_of(module: str) -> str:
    """What ``python -m module --help`` prints."""
    found = import_module(module)
    main = (import_module(f"{module}.__main__") if hasattr(found, "__path__") else found).main
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        main(["--help"])
    return text.getvalue()


@every_page
def test_shell_commands_can_be_run(page: Path) -> None:
    """Their modules and scripts exist, have these options, and their extras are the package's."""
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    for words in commands(page):
        told = shlex.join(words)
        if words[:2] == ["pip", "install"]:
            extra = re.fullmatch(r"\.(?:\[(\w+)\])?", words[-1])
            assert extra and (extra[1] is None or extra[1] in setup["options.extras_require"]), told
        elif words[:3] == ["python", "-m", "pytest"]:
            assert all((ROOT / word.partition("::")[0]).exists() for word in words if "tests/" in word), told
        elif words[:2] == ["python", "-m"] and words[2].startswith("recipes."):
            known = options_of(words[2])
            assert "usage:" in known, told
            for option in (word for word in words[3:] if word.startswith("--")):
                assert re.search(rf"{option}\b", known), f"{told}: {option}"
            if words[2] == "recipes.train":
                assert words[3] in TASKS, told
        elif words[0] in ("torchrun", "bash", "python"):
            assert any((ROOT / word).is_file() for word in words[1:]), told
        else:
            assert words[0] in ("tensorboard", "ruff", "mypy"), told


# What is named


@every_page
def test_links_lead_somewhere(page: Path) -> None:
    for link, anchor in re.findall(r"\]\((?!http)([^)#]*)(?:#([^)]+))?\)", page.read_text()):
        target = page.parent / link if link else page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target if target.is_file() else target / "README.md"), f"{link}#{anchor}"


def anchors(page: Path) -> list[str]:
    """Of the page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]


FILES = {path.name for folder in ("fam_optim", "recipes", "tests") for path in (ROOT / folder).rglob("*.py")}


@every_page
def test_files_recipes_and_tasks_that_are_named_exist(page: Path) -> None:
    text = page.read_text()
    for file in re.findall(r"`([\w/]+\.py)`", text):
        assert (ROOT / file).exists() if "/" in file else file in FILES, file
    for name in re.findall(r"`python -m (recipes\.[\w.]*\w)", text):
        assert "usage:" in options_of(name)
    for task in re.findall(r"`train ([\w-]+)", text):
        assert task in TASKS
    for table in tables(page):
        if "command" in table.header:  # whose cells leave out "python -m recipes."
            cells = [cell for (cell,) in table.select(("command",)) if cell]
            assert all("usage:" in options_of(f"recipes.{cell.strip('`').split()[0]}") for cell in cells)


@pytest.mark.parametrize("page", ["README.md", "fam_optim/README.md", "recipes/README.md", "tests/README.md"])
def test_no_aside_is_longer_than_a_sentence(page: str) -> None:
    prose = re.sub(r"^```.*?^```$", "", (ROOT / page).read_text(), flags=re.DOTALL | re.MULTILINE)
    prose = re.sub(r"\]\([^)]*\)", "]", prose)
    asides = re.findall(r"\(([^()]*)\)", prose)
    assert [aside for aside in asides if len(aside.split()) >= 30] == []


# Numbers


class Table(NamedTuple):
    """A table of a page: its columns, and its rows."""

    header: tuple[str, ...]
    rows: list[tuple[str, ...]]

    def select(self, columns: tuple[str, ...]) -> list[tuple[str, ...]]:
        """The rows in these columns alone, of which two may have one name; none, if one is not there."""
        own = numbered(self.header)
        if not {*numbered(columns)} <= {*own}:
            return []
        places = [own.index(column) for column in numbered(columns)]
        return [tuple(row[place] for place in places) for row in self.rows]


def numbered(columns: tuple[str, ...]) -> list[tuple[str, int]]:
    """Each name with how often it stood before."""
    return [(name, columns[:place].count(name)) for place, name in enumerate(columns)]


def parse(text: str) -> list[Table]:
    """The tables of a Markdown text."""
    found = []
    for lines in re.findall(r"(?:^\|.*\n?)+", text, flags=re.MULTILINE):
        cells = [re.split(r"(?<!\\)\|", line.strip())[1:-1] for line in lines.splitlines()]
        header, rule, *rows = [tuple(cell.strip() for cell in row) for row in cells]
        assert all(set(cell) <= set(":- ") for cell in rule) and {len(row) for row in rows} == {len(header)}
        found.append(Table(header, rows))
    return found


def tables(page: Path) -> list[Table]:
    return parse(page.read_text())


@cache
def saved_tables() -> list[Table]:
    """Every table that the recipes make of the results that lie beside them."""

    def runs(name: str) -> Any:
        return load(RESULTS / f"{name}.json")["runs"]

    made = [scaling.table(runs("scaling"))]
    made += [estimators.table(runs(name)) for name in ("estimators", "estimators_gauss_newton")]
    made += paper.tables()
    several = {
        "benchmark": benchmark_tables.tables,
        "counts": benchmark_tables.tables,
        "train": report.tables,
    }
    for path in sorted(RESULTS.glob("*.json")):
        saved = load(path)
        if saved["recipe"] in several:
            made += several[saved["recipe"]](saved["runs"])
    texts = [markdown(table) for table in made]
    texts += [path.read_text() for path in RESULTS.rglob("tables.md")]  # see the test below
    return parse("\n\n".join(texts))


# Tables written by hand, by their first column: explanations, and the benchmark's targets and profile, whose
# old versions are gone. Everything else must be found in the saved results.
PROSE = {"setting", "`mode`", "`curvature`", "situation", "loop", "target", "phase"}
PROSE |= {"label", "what you see", "in the paper", "question", "file", "folder", "array"}


@pytest.mark.slow
@every_page
def test_results_are_rows_and_columns_of_saved_ones(page: Path) -> None:
    for table in tables(page):
        if table.header[0] in PROSE:
            continue
        found = {row for saved in saved_tables() for row in saved.select(table.header)}
        assert [row for row in table.rows if row not in found] == [], table.header


@pytest.mark.slow
def test_the_studys_tables_are_those_of_its_saved_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study, "draw", lambda *of_what: None)  # pictures are the study's own tests' business
    for path in (RESULTS / "study").glob("*.json*"):
        shutil.copy(path, tmp_path)
    with warnings.catch_warnings():
        study.main(["--report", str(tmp_path)])
    assert (tmp_path / "tables.md").read_text() == (RESULTS / "study" / "tables.md").read_text()
