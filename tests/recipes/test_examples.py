"""The examples run, each in a process of its own, and learn what they are to learn.

One is started as their page says; the others in processes that have imported torch already, with what
torchrun would tell them.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import re
import runpy
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.distributed import PRELOAD

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "recipes" / "examples"


def forked(name: str, *arguments: str, folder: Path, processes: int = 1) -> str:
    """Run an example in so many processes; what the first prints."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    group |= {"WORLD_SIZE": str(processes), "OMP_NUM_THREADS": "1"}
    command = [str(EXAMPLES / f"{name}.py"), *arguments]
    outputs = [folder.parent / f"{folder.name}-{rank}" for rank in range(processes)]
    members = [
        context.Process(target=become, args=(command, folder, output, {**group, "RANK": str(rank)}))
        for rank, output in enumerate(outputs)
    ]
    for member in members:
        member.start()
    for member in members:
        member.join(300)
        member.kill()  # one that hangs
    errors = [output.with_suffix(".err").read_text() for output in outputs]
    assert [member.exitcode for member in members] == [0] * processes, "\n".join(errors)
    return outputs[0].with_suffix(".out").read_text()


def become(command: list[str], folder: Path, output: Path, environment: dict[str, str]) -> None:
    """Run an example in this process, as a program is run."""
    os.chdir(folder)
    os.environ.update(environment)
    torch.set_num_threads(1)
    for stream, suffix in ((1, ".out"), (2, ".err")):
        os.dup2(os.open(output.with_suffix(suffix), os.O_WRONLY | os.O_CREAT), stream)
    sys.argv = command
    runpy.run_path(command[0], run_name="__main__")


LEARNS = {  # example -> the test accuracy in per cent that it should reach
    "plain_loop": 75,  # SGD alone ends at 67
    "with_lightning": 90,
    "fine_tune_bert": 95,
    "two_processes": 90,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LEARNS)
def test_learns(name: str, tmp_path: Path) -> None:
    if name == "plain_loop":
        command = [sys.executable, str(EXAMPLES / f"{name}.py")]
        path = os.pathsep.join([str(ROOT), *sys.path])
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        ran = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
        )
        assert ran.returncode == 0, ran.stderr
        said = ran.stdout
    else:
        said = forked(name, folder=tmp_path, processes=2 if name == "two_processes" else 1)
    (accuracy,) = re.findall(r"test accuracy ([\d.]+)%", said.splitlines()[-1])
    assert float(accuracy) > LEARNS[name]
    if name == "two_processes":
        assert "2 processes, the same weights in all: True" in said
    assert not [*tmp_path.iterdir()]  # nothing is left behind


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("tensorboard"), reason="TensorBoard is not installed")
def test_kappa_is_logged_and_drawn(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    said = forked("log_kappa", "--out", "logs", folder=tmp_path)
    assert (tmp_path / "logs" / "kappa.png").stat().st_size > 5000
    events = EventAccumulator(str(tmp_path / "logs"))
    events.Reload()
    kappas = [event.value for event in events.Scalars("kappa")]
    assert len(kappas) == len(events.Scalars("loss")) == 60
    assert all(kappa > 0 for kappa in kappas)
    assert f"kappa {kappas[-1]:.3f}" in said


def test_without_tensorboard_the_remedy_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    for name in [name for name in sys.modules if name.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(EXAMPLES / "log_kappa.py"), run_name="__main__")
    assert stopped.value.code == 'TensorBoard is not installed: pip install -e ".[examples]"'


def test_the_page_names_every_example_and_each_is_of_one_page() -> None:
    page = (EXAMPLES / "README.md").read_text()
    files = sorted(EXAMPLES.glob("*.py"))
    assert sorted(re.findall(r"recipes/examples/(\w+)\.py", page)) == [path.stem for path in files]
    assert {path.stem for path in files} == {*LEARNS, "log_kappa"}
    for path in files:
        assert 30 <= len(path.read_text().splitlines()) <= 60, path.name
