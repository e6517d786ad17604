"""The examples run as their page says, each as a program of its own, and learn what they are to learn."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "recipes" / "examples"
PYTHON = (sys.executable,)
TORCHRUN = (*PYTHON, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def run(*command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


LEARNS = {  # example -> how it is started, and the test accuracy in per cent that it should reach
    "plain_loop": (PYTHON, 75),  # SGD alone ends at 67
    "with_lightning": (PYTHON, 90),
    "fine_tune_bert": (PYTHON, 95),
    "two_processes": (TORCHRUN, 90),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LEARNS)
def test_learns(name: str, tmp_path: Path) -> None:
    start, accuracy = LEARNS[name]
    ran = run(*start, str(EXAMPLES / f"{name}.py"), folder=tmp_path)
    assert ran.returncode == 0, ran.stderr
    last = ran.stdout.splitlines()[-1]
    assert float(re.findall(r"test accuracy ([\d.]+)%", last)[0]) > accuracy
    assert "weights in all: False" not in ran.stdout
    assert not [*tmp_path.iterdir()]  # nothing is left behind


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("tensorboard"), reason="TensorBoard is not installed")
def test_kappa_is_logged_and_drawn(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    ran = run(*PYTHON, str(EXAMPLES / "log_kappa.py"), "--out", "logs", folder=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert (tmp_path / "logs" / "kappa.png").stat().st_size > 5000
    events = EventAccumulator(str(tmp_path / "logs"))
    events.Reload()
    kappas = [event.value for event in events.Scalars("kappa")]
    assert len(kappas) == len(events.Scalars("loss")) == 60
    assert all(kappa > 0 for kappa in kappas)
    assert f"kappa {kappas[-1]:.3f}" in ran.stdout


def test_without_tensorboard_the_remedy_is_one_sentence(tmp_path: Path) -> None:
    script = "import runpy, sys; sys.modules['tensorboard'] = None; runpy.run_path(sys.argv[1])"
    ran = run(*PYTHON, "-c", script, str(EXAMPLES / "log_kappa.py"), folder=tmp_path)
    assert ran.returncode == 1
    assert ran.stderr == 'TensorBoard is not installed: pip install -e ".[examples]"\n'


def test_the_page_names_every_example_and_each_is_of_one_page() -> None:
    page = (EXAMPLES / "README.md").read_text()
    files = sorted(EXAMPLES.glob("*.py"))
    assert sorted(re.findall(r"recipes/examples/(\w+)\.py", page)) == [path.stem for path in files]
    assert {path.stem for path in files} == {*LEARNS, "log_kappa"}
    for path in files:
        assert 30 <= len(path.read_text().splitlines()) <= 60, path.name
