"""The package as someone has it who never saw this repository: built, installed alone, used, type checked.

The source distribution and the wheel are made by the two hooks that ``python -m build`` calls.
"""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tarfile
import textwrap
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest

import fam_optim

ROOT = Path(__file__).parent.parent
PAPERS = ("README.md", "CHANGELOG.md", "LICENSE", "MANIFEST.in", "pyproject.toml", "setup.cfg")
SOURCES = ("fam_optim", "tests", *PAPERS)


def python(*arguments: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


def build(hook: str, folder: Path) -> Path:
    """What a hook of the build backend makes of the sources in a folder."""
    made = python("-c", f"from setuptools.build_meta import *; print(build_{hook}('dist'))", folder=folder)
    assert made.returncode == 0, made.stderr
    return folder / "dist" / made.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package alone: sources -> source distribution -> wheel -> pip install."""
    folder = tmp_path_factory.mktemp("package")
    for name in SOURCES:
        source, target = ROOT / name, folder / "sources" / name
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        else:
            target.parent.mkdir(exist_ok=True)
            shutil.copy(source, target)
    with tarfile.open(build("sdist", folder / "sources")) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    wheel = build("wheel", unpacked)
    target = folder / "target"
    pip = ("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(target), str(wheel))
    made = python(*pip, folder=folder)
    assert made.returncode == 0, made.stderr
    return target


@pytest.mark.slow
def test_the_readmes_first_block_runs(installed: Path, tmp_path: Path) -> None:
    block = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)[0]
    program = """
        import torch
        from torch import nn

        x, y, criterion = torch.randn(12, 6), torch.randint(0, 3, (12,)), nn.CrossEntropyLoss()
        model = nn.Sequential(nn.Linear(6, 8), nn.ReLU())
        model.add_module("head", nn.Linear(8, 3))
        model.head = model[-1]
    """
    after = """
        import fam_optim
        for _ in range(10):
            optimizer.step(lambda: (optimizer.zero_grad(), criterion(model(x), y))[1])
        assert optimizer.last_kappa > 0
        print(fam_optim.__file__)
    """
    script = textwrap.dedent(program) + block + textwrap.dedent(after)
    ran = python("-c", script, folder=tmp_path, PYTHONPATH=str(installed))
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines()[-1] == str(installed / "fam_optim" / "__init__.py")


def test_the_library_needs_torch_alone() -> None:
    found = set()
    for path in (ROOT / "fam_optim").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0 and node.module
                found.add(node.module.partition(".")[0])
    assert found - sys.stdlib_module_names == {"torch", "fam_optim"}


def test_imports_of_the_library_have_no_circle() -> None:
    """Not even those for types: every file can be read after the files that it names."""
    paths = list((ROOT / "fam_optim").rglob("*.py"))
    names = {path: ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in paths}
    above: dict[str, set[str]] = {}
    for path, name in names.items():
        above[name.removesuffix(".__init__")] = imported = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                files = {f"{node.module}.{alias.name}" for alias in node.names} & set(names.values())
                imported |= files or {node.module}
    while above:
        lowest = {name for name, imported in above.items() if imported.isdisjoint(above)}
        assert lowest, f"in a circle: {sorted(above)}"
        above = {name: imported for name, imported in above.items() if name not in lowest}


@pytest.mark.slow
def test_metadata(installed: Path) -> None:
    (folder,) = installed.glob("fam_optim-*.dist-info")
    metadata: Message = Parser().parsestr((folder / "METADATA").read_text())
    assert metadata["Name"] == "fam_optim" and metadata["Version"] == fam_optim.__version__
    for field in ("Summary", "Author", "Keywords", "Requires-Python"):
        assert metadata[field], field
    assert metadata["License"] == "MIT" and (folder / "licenses" / "LICENSE").exists()
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert metadata.get_payload().strip() == (ROOT / "README.md").read_text().strip()
    required = [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    assert required == ["torch>=2.6"]
    assert {path.name for path in installed.iterdir()} == {"fam_optim", folder.name}


@pytest.mark.slow
def test_the_source_distribution_is_the_library_alone(installed: Path) -> None:
    (path,) = (installed.parent / "sources" / "dist").glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.split("/")[1] for name in archive.getnames() if "/" in name}
    assert names == {"fam_optim", *PAPERS, "PKG-INFO", "fam_optim.egg-info"}  # the last two are setuptools'


GOOD = """
import torch
from torch import Tensor, nn
from fam_optim import FAM, Observation, dataset_relative_flatness, observe, relative_flatness, weight_layers

model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
x, y, criterion = torch.randn(5, 3), torch.zeros(5).long(), nn.CrossEntropyLoss()
fam = FAM(model.parameters(), torch.optim.SGD, layer=model[2], lam=0.01, detach_hessian=True, lr=0.1)
whole = FAM.for_model(model, torch.optim.SGD, lr=0.1, momentum=0.9)
several = FAM([{"params": model.parameters()}], torch.optim.AdamW, weight_layers(model)[:-1], lr=0.1)
bare = FAM(model.parameters(), lambda p, **kw: torch.optim.SGD(p, **kw), nn.Parameter(x), mode="full", lr=1)
optimizer: torch.optim.Optimizer = fam
schedule = torch.optim.lr_scheduler.StepLR(fam, 1)
fam.zero_grad()
fam.step(lambda: criterion(model(x), y))
regularized: Tensor = fam.regularize(criterion(model(x), y))
fam.lam = 2 * fam.lam
if fam.last_kappa is not None:
    print(fam.last_kappa.item())
with observe(model[2]) as layer:
    loss = criterion(model(x), y)
one: Observation = layer
kappa: Tensor = relative_flatness(loss, [layer, nn.Parameter(torch.eye(2))], mode="full", n_samples=2)
kappa = dataset_relative_flatness(model, model[2], criterion, [(x, y)], curvature="gauss_newton")
"""

BAD = {  # what a user might write -> what the type checker answers
    "FAM(model.parameters(), torch.optim.SGD(model.parameters()), model[2])": 'has incompatible type "SGD"',
    'FAM(model.parameters(), torch.optim.SGD, "head", lr=0.1)': 'has incompatible type "str"',
    'FAM(model.parameters(), torch.optim.SGD, model[2], lam="0.1", lr=0.1)': '"lam" to "FAM" has incomp',
    "FAM(model.parameters(), torch.optim.SGD, lr=0.1)": 'Missing positional argument "layer"',
    "fam.last_kappa.item()": 'Item "None" of "Tensor | None" has no attribute "item"',
    "fam.last_kappa = x": 'Property "last_kappa" defined in "FAM" is read-only',
    "relative_flatness(loss, model[2])": 'to "relative_flatness" has incompatible type',
    "relative_flatness(loss, layer, 'neuronwise')": "Too many positional arguments",
    "observe(model[2].weight)": 'to "observe" has incompatible type',
    "fam.regularise(loss)": 'has no attribute "regularise"; maybe "regularize"',
}


@pytest.mark.slow
@pytest.mark.parametrize("marked", [True, False], ids=["py.typed", "not marked"])
def test_a_users_code_is_type_checked(marked: bool, installed: Path, tmp_path: Path) -> None:
    """mypy takes the annotations from the installed package, because of ``py.typed`` and not without it."""
    packages = tmp_path / "packages"
    shutil.copytree(installed, packages)
    if not marked:
        (packages / "fam_optim" / "py.typed").unlink()
    (tmp_path / "user.py").write_text(GOOD + "\n".join(BAD) + "\n")
    arguments = ("--strict", "--cache-dir", str(installed.parent / "mypy"), "user.py")  # torch is read once
    checked = python("-m", "mypy", *arguments, folder=tmp_path, PYTHONPATH=str(packages))
    errors = [line for line in checked.stdout.splitlines() if ": error: " in line]
    if not marked:
        assert "missing library stubs or py.typed marker" in errors[0]
        return
    first = GOOD.count("\n") + 1
    found = {int(line.split(":")[1]): line for line in errors}
    assert sorted(found) == list(range(first, first + len(BAD))), checked.stdout
    for number, (line, wanted) in enumerate(BAD.items(), first):
        assert wanted in found[number], line


def test_changelog_says_what_changed_since_which_version() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text()
    heads = re.findall(r"^## \[([\d.]+)\] - \d{4}-\d{2}-\d{2}$", changelog, flags=re.MULTILINE)
    assert heads[0] == fam_optim.__version__
    changed = re.findall(r"^### (?:Changed|Fixed)(.*)$", changelog, flags=re.MULTILINE)
    assert {*changed} <= {f" since {version}" for version in heads[1:]}
