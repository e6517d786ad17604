""".ci/run does what README says, in the environment that it is told to use, wherever that is."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TOOLS = ("python", "pip", "ruff", "mypy")


def commands(environment: Path, told: str) -> list[str]:
    """What .ci/run runs, seen by tools in an environment's place that write down how they are called."""
    (environment / "bin").mkdir(parents=True)
    for tool in TOOLS:
        path = environment / "bin" / tool
        path.write_text(f'#!/bin/sh\necho "{tool} $@" >> "{environment}/calls"\n')
        path.chmod(0o755)
    script = ROOT / ".ci" / "run"
    subprocess.run([script], env={**os.environ, "FAM_OPTIM_VENV": told}, cwd="/", check=True, timeout=60)
    return (environment / "calls").read_text().splitlines()


@pytest.mark.parametrize("how", ["absolute", "relative"])
def test_ci_runs_lint_types_and_the_readmes_test_command(how: str, tmp_path: Path) -> None:
    told = str(tmp_path) if how == "absolute" else os.path.relpath(tmp_path, ROOT)
    install, *checks, tests = commands(tmp_path, told)
    assert checks == ["ruff check .", "ruff format --check .", "mypy "]
    (line,) = re.findall(r"^(pip install .*?python -m pytest.*?)\s*(?:#.*)?$", readme(), flags=re.MULTILINE)
    assert line.replace('"', "") == f"{install} && {tests}"


def readme() -> str:
    return (ROOT / "README.md").read_text()
